"""Scores of heads on a model, and what heads are named after them."""
