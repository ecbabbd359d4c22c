"""Semantic segmentation: pairs of image and mask, heads, evaluation by sliding windows."""
