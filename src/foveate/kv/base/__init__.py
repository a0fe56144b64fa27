"""The seams of cache policies: the general one, and policies that rank slots by a score."""
