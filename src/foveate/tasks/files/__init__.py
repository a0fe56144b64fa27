"""Prompts from files: readers, the known row formats, and the task around them."""
