"""Weights into a run and out of it."""
