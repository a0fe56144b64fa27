"""Tasks to train small networks on."""
