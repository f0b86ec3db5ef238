"""What `ia3` and other ways make of a few labelled rows of real data: `python -m benchmarks.real_data --help`."""
