"""The cost model (method 7, docs/scaling.md): FLOPs, memory and communication of a recipe, and the resulting advice."""
