"""What several layers share: head schemes, positions, blocks, windows."""
