"""Benches: each is a command of `mimae bench` and writes JSON, from which the tables in the documentation are made."""
