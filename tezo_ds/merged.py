"""Merged models of runs: see `tezo_ds.export.merged`, whose public names are here."""

from tezo_ds.export.merged import is_complete, refuse_filled, save_merged
from tezo_ds.files.text import writing

__all__ = ["is_complete", "refuse_filled", "save_merged", "writing"]
