"""Analysis of runs: a report of one run, a comparison of several runs, a live view, a profile of a step."""
