"""The study of rank and number of heads: On the Benefits of Rank in Attention Layers (2024), arXiv 2407.16153."""
