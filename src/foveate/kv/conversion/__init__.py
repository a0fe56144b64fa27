"""Conversions: a new model whose cache is smaller, from a pretrained one."""
