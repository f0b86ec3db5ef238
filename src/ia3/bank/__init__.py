"""Thousands of adapters in one array, and a different adapter for each row of a batch: `AdapterBank`."""

from ia3.bank.bank import AdapterBank, BankStatistics
from ia3.bank.layout import Entry

__all__ = ["AdapterBank", "BankStatistics", "Entry"]
