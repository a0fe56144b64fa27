"""Models of saliency."""
