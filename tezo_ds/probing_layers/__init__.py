"""Choice of the matrices to train: gradient, noise and curvature of each, from forwards alone."""
