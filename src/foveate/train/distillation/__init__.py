"""Training against another model."""
