"""Semantic segmentation: pairs of image and mask, heads, evaluation with sliding windows."""
