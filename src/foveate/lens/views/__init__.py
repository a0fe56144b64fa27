"""Views of attention: the drawings and pages that show maps, heads and neurons."""
