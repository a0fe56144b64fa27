"""Initialisation of weights."""
