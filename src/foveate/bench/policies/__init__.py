"""Every cache policy on pretrained decoders, side by side: the reference run."""
