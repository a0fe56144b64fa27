"""Cache and prefill policies for decoders: which tokens are kept, and which are read."""
