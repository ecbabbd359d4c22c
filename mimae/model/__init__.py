"""The networks, and the masks that they see images through."""
