"""The kinds of exports, a file each: what lies in the folder, and what cannot be expressed there."""
