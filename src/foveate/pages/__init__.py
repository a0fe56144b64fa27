"""Web pages that stand alone: their skeleton, style and scripts, and forms of texts and numbers that fit into them."""
