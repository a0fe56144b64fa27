"""Web pages that stand alone: their skeleton, style and scripts, and texts and numbers in a form that fits into them."""
