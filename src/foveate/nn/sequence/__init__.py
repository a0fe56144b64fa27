"""Layers on sequences of tokens, `(B, N, C) -> (B, N, C)`."""
