"""Data loading: from image sources to micro-batches on the device."""
