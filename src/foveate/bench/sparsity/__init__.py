"""Sparse operators against fused dense attention: time, the ideal, and the error on real tensors."""
