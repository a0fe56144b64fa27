"""The host for transformers: models, masks, caches and the attention interface."""
