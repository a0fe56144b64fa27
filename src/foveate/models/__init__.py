"""Whole networks, built from layers: decoders over tokens, transformers over image patches, and papers' own models."""
