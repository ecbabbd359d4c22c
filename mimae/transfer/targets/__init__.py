"""The kinds of exports, one file each: the files in the folder, and the models that the format cannot express."""
