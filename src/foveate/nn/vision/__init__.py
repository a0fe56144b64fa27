"""Layers on images and grids."""
