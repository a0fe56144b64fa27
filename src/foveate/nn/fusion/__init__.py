"""Attention between several inputs."""
