"""Base classes of tasks: prompts with a score, and batches to train on."""
