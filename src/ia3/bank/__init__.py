"""Thousands of adapters as the rows of one array, and a different one for each row of a batch: `AdapterBank`."""

from ia3.bank.bank import AdapterBank, BankStatistics
from ia3.bank.layout import Entry

__all__ = ["AdapterBank", "BankStatistics", "Entry"]
