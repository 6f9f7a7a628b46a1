"""Counter-based random numbers: pure functions of (seed, name, purpose, index), equal on every device."""
