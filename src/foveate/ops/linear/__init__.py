"""Operators with a state of fixed size, in linear time."""
