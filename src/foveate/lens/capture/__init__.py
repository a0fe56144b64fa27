"""Statistics of attention, computed while a model runs."""
