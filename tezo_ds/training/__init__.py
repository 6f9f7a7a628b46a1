"""A training run: the session, the loop, the terminal's display, interrupts, liveness of ranks."""
