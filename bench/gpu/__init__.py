"""All that needs a GPU, in one command that fits into a quarter of an hour on a borrowed one."""
