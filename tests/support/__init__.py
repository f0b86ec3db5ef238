"""Models, data and servers that several test files share; `from support import tiny` works in all of them."""
