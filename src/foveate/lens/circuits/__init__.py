"""Causes: interventions on heads, and what they change."""
