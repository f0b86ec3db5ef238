"""Rows become questions in words: data, templates, tasks; `task.py` is where to begin."""
