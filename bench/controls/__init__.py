"""The controls of the method: runs, probes and their tables."""
