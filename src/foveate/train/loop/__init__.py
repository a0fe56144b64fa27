"""The training loop, with its networks, schedules, checkpoints and seeds."""
