"""The benchmarks' own scoring rules, exact to the letter: each says which repository it follows."""
