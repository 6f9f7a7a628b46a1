"""Directions of each example's own (`placement: per_example`)."""
