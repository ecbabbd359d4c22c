"""Use of a trained encoder outside its run: exports for other libraries, features of data sets, pictures."""
