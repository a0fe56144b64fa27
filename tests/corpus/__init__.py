"""Broken folders and odd files, made from one tiny random model: what `foveate compare` meets on people's machines.

`python -m tests.corpus FOLDER` writes them all, to look at or to try by hand.
"""
