"""What runs learn: each task in a file of its own."""
