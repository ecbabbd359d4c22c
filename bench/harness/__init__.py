"""Harnesses that inject faults into runs, loaders and inputs: drill, soak and fuzz."""
