"""Baselines that this system is measured against."""
