"""(IA)³ adapters in the lm-evaluation-harness. Start with `model.py`."""

from ia3.errors import InputError, needs


def missing() -> InputError:
    """The error where the harness is not installed."""
    return needs("The harness", "lm-eval", "lm-eval")
