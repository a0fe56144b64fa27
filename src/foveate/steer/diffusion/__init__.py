"""Steering of diffusion models."""
