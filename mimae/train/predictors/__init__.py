"""Predictors: what a trained model of each task finds in images, and the file that it goes to."""
