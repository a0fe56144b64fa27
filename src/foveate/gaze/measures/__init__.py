"""Measures: saliency maps against fixations or other maps, and scanpaths against scanpaths."""
