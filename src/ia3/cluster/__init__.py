"""Ray: an experiment's trials, and files of rows, shared out to workers on one machine or many."""
