"""Recipes: the tree of settings, its YAML layers and its checks."""
