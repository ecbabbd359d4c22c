"""The fuzz harness: random damaged inputs, each used in a forked child with limits on memory and time."""
