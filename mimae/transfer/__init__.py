"""What a pretrained encoder is worth on other tasks."""
