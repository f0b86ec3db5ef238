"""(IA)³ itself: vectors in a model, and an adapter on disk; `model.py` is where to begin."""
