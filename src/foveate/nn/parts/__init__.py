"""Parts that several layers share: head schemes, positions, blocks, windows."""
