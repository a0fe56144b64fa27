"""The base class of studies."""
