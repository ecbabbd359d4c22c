"""What happens to one image: decoding, cropping, flipping and resizing."""
