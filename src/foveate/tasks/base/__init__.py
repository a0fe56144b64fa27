"""The seams of tasks: examples with a score, and batches to train on."""
