"""Safe ways to the outside: text on terminals, files of a run, files of strangers."""
