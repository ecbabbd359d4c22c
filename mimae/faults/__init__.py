"""Protection of a run: lock, signals, watchdog, non-finite steps and memory shortage."""
