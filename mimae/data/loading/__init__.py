"""From samples to micro-batches: sample order, loaders and the copy to the device."""
