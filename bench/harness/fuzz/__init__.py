"""The fuzz harness: inputs that are drawn and damaged, each used in a forked child with bounds on memory and time."""
