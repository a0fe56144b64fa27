"""Published networks for audio."""
