"""Looking at runs: a report of one, a comparison of many, a live view, a profile of a step."""
