"""The work behind `foveate compare`: methods side by side on the same prompts."""
