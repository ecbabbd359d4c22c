"""Harnesses that harm runs, loaders and inputs on purpose: drill, soak and fuzz."""
