"""Weights stored in fewer bits than they are used in: which layers hold them, and how they are asked for."""
