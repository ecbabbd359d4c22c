"""The losses of MI-MAE, and the small networks that only the losses need."""
