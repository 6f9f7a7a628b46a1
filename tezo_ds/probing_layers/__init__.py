"""Which matrices to train: gradient, its noise and curvature of each, from forwards alone, and a choice."""
