"""Object detection with boxes and masks: annotations, examples, the model and its average precision."""
