"""Distillation: training against another model."""
