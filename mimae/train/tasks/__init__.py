"""Tasks, each in a file of its own."""
