"""Checkpoints of a run: their contents, writing and verification."""
