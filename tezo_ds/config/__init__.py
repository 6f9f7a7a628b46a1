"""Validated configuration of a run, from the `tezo` block of a DeepSpeed JSON, a dict, or flags."""

from tezo_ds.config.block import BLOCK, FREE, TezoConfig
from tezo_ds.config.reading import build, resolve

__all__ = ["BLOCK", "FREE", "TezoConfig", "build", "resolve"]
