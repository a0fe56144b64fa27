"""Attention over channels and features."""
