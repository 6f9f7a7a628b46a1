"""Adapters: small functions with parameters of their own beside a model's frozen weights."""

from tezo_ds.adapters.loading import load

__all__ = ["load"]
