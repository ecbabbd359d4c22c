"""Engines, which shard a model over ranks and take the optimizer's steps."""
