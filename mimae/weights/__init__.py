"""Weights of other runs and projects: their names, their files, and how a model starts from them."""
