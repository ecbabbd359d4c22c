"""Safe input and output: text on terminals, files of a run, untrusted files."""
