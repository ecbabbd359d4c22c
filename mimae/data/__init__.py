"""Images in, micro-batches out."""
