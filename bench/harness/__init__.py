"""Harnesses that harm runs and loaders on purpose: drill and soak."""
