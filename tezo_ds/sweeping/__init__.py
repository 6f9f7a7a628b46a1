"""Sweeps: many short runs in one process, of which the better ones go on."""
