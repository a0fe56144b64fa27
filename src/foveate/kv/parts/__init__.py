"""What several cache policies share."""
