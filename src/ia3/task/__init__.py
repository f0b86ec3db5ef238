"""Rows become prompts and answers: data, templates, tasks. Start with `task.py`."""
