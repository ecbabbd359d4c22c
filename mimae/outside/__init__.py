"""What comes from outside and goes there: text on terminals, files of a run, files of strangers."""
