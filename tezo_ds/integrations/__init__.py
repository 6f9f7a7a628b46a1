"""Entries from other libraries: the Trainer of transformers."""
