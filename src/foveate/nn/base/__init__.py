"""The base classes of layers."""
