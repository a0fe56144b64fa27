"""Tasks with long real text as their prompts."""
