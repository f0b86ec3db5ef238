"""(IA)³ adapters in the lm-evaluation-harness. Start with `model.py`."""

EXTRA = "The harness needs the package 'lm_eval'; install it: pip install 'ia3[lm-eval]'"
"""The error where it is not installed."""
