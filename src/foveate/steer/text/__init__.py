"""Steering of text models."""
