"""Interventions at inference."""
