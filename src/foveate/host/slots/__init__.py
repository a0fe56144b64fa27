"""Slots: the storage of a layer whose heads keep different tokens."""
