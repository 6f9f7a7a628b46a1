"""Losses of the branches of a step."""
