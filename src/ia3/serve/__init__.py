"""Serve any number of adapters of one model over HTTP: `ia3 serve`."""
