"""Recipe, losses and trainers of adapters; `trainer.py` is where to begin."""
