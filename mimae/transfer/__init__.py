"""The encoder out of a run: exports for other libraries, features of data sets, pictures."""
