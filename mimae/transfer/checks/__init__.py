"""The check.py of each kind of export: scripts that need one library, but not this project."""
