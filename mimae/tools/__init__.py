"""Commands that work on a finished or running run, or on this machine."""
