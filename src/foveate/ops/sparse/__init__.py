"""Operators that choose some keys for each query."""
