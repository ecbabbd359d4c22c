"""The check.py of each kind of export: scripts that need one library, and nothing of this project."""
