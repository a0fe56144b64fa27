"""Parts that networks share: decoders, encoders, specifications, checkpoints and tokenizers."""
