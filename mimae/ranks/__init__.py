"""The place of a process among the ranks of a job, and how ranks exchange messages that run no code."""
