"""Tasks of long real text."""
