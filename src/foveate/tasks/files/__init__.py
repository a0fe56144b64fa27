"""Prompts from the files that people have."""
