"""The profile of a recipe's step by torch.profiler: time, FLOPs and memory by phase, next to the planned figures."""
