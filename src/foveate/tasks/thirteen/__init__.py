"""RULER's thirteen tasks on text that ships with Python, at any length in tokens."""
