"""Rows of published benchmarks: each file turns one benchmark's rows into prompts with its own scoring rule."""
