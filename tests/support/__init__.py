"""Helpers that tests share: models, tensors, claims."""
