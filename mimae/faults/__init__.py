"""What keeps a run alive: lock, signals, watchdog, non-finite steps and memory shortage."""
