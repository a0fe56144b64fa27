"""What was measured, for people: a table for the terminal, one for Markdown, and a self-contained web page."""
