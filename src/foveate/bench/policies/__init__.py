"""The reference run: every cache policy on pretrained decoders, side by side."""
