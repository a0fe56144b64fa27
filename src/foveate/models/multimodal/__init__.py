"""Networks that answer questions about images, and others over several modalities."""
