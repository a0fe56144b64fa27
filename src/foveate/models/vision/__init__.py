"""Published vision networks."""
