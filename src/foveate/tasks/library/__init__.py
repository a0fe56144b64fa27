"""Tasks on the standard library's documentation and source, at any length in tokens."""
