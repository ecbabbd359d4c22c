"""Benchmarks of the fused ops: time, memory, and the bytes that they move."""
