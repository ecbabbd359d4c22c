"""Commands that look at a data set or write a new one."""
