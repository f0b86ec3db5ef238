"""A model answers questions: what packing, prefixes and families of models are; `choices.py` is where to begin."""
