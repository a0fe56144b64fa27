"""Operators whose state is a network that learns at test time."""
