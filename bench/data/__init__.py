"""Benchmarks of the loaders."""
