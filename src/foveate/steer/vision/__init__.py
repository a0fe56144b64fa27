"""Steering of vision-language models."""
