"""Benchmarks of a whole training step, and of each engine."""
