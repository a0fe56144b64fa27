"""Baselines, and parts that several systems share."""
