"""Explanations of single predictions: what each token contributed, by attention and by methods after the fact."""
