"""Models of visual search."""
