"""Attention that pools a sequence."""
