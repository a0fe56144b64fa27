"""Recipes: methods and their options as a JSON file, with what they learnt of a model beside it."""
