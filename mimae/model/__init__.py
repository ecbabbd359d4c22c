"""The networks, and the masks that choose which patches they see."""
