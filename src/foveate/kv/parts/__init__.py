"""Parts that several cache policies share."""
