"""Scanpaths, fixations and densities, and the base classes of models that predict them."""
