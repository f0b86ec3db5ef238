"""How fast, beside others: `python -m benchmarks` for whole jobs, and a script for each part of one."""
