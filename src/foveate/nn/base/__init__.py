"""The seams of layers."""
