"""Published networks that recommend."""
