"""Quantized weights."""


def is_quantized(module):
    return False


def rescaled(module, before, after):
    raise NotImplementedError
