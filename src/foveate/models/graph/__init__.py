"""Published networks on graphs."""
