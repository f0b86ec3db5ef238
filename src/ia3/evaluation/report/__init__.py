"""A report to look at: how good an adapter is, where it errs, and which training rows to look at again."""
