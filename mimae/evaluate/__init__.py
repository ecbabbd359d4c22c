"""Evaluation measures that training and commands share."""
