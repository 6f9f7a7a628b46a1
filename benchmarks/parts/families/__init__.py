"""Families of models, made tiny, and what works with each: parts of `families.py`."""
