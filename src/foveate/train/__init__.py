"""Training: losses, initialisers, and a loop that trains a small network with any operator on any task."""
