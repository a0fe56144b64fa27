"""Operators that score every pair of tokens."""
