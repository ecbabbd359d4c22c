"""Processing of a single image: decoding, cropping, flipping and resizing."""
