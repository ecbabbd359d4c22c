"""A step of a recipe under torch.profiler: time, FLOPs and memory by phase, beside what the planner foresees."""
