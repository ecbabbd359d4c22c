"""Baselines for comparison with this system."""
