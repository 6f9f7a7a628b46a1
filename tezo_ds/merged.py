"""Public names of `tezo_ds.export.merged`, and `writing`."""

from tezo_ds.export.merged import is_complete, refuse_filled, save_merged
from tezo_ds.files.text import writing

__all__ = ["is_complete", "refuse_filled", "save_merged", "writing"]
