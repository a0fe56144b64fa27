"""Attention from a decoder to a source."""
