"""GridQA: a small vision-language model that answers questions about a picture of cells, and its questions.

It has the shape of LLaVA, so that methods on image tokens can be tried in seconds. Trained with a prior, it guesses the
usual colour of a cell that it cannot see well: it hallucinates.
"""

from foveate.labs.grid_qa.questions import Questions, draw, embedded
from foveate.labs.grid_qa.recipe import GridRecipe, load, train

__all__ = ["GridRecipe", "Questions", "draw", "embedded", "load", "train"]
