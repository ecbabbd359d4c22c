"""Engines: how a model is spread over ranks, and how a step is taken there."""
