"""The study of training dynamics in one layer: Scan and Snap (2023), arXiv 2305.16380."""
