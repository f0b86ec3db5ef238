"""A model answers questions: `scorer.py` is where to begin, `decoder.py` shows what a packed row is."""
