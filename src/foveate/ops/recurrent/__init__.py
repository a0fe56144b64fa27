"""Softmax attention with a state of constant size."""
