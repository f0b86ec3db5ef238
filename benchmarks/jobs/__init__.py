"""Whole jobs, ours beside what others do and beside the least that the hardware has to do.

`rows` says what the rows of the suite are, `ours`, `peers`, `adapterhub` and `floor` how each column does them, `worker`
runs one column in processes of its own, `run` runs all of them in turn, and `report` makes tables and the picture.

Only `worker`, `peers` and `adapterhub` are imported in AdapterHub's own environment; they import nothing of ia3.
"""
