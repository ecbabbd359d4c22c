"""Measures of what was learned, which training and commands share."""
