"""How samples become micro-batches: order, loaders and the copy to the device."""
