"""A model answers questions: `scorer.py` is where to begin, `decoder.py` shows what a packed row is."""

MEMORY = "2GiB"
"""What `Readings` keep at most, where nobody says how much."""
