"""Benches: each is a verb of `mimae bench` and writes JSON, from which the tables of the documents are made."""
