"""Weights of other runs and projects: their names, their files, and the start of a model from them."""
