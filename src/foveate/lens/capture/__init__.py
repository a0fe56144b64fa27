"""How statistics of attention are computed while a model runs."""
