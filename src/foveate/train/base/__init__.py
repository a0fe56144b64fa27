"""The base classes of objectives and initialisers."""
