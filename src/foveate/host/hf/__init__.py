"""Adapters for transformers: models, masks, caches and the attention interface."""
