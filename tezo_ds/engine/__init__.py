"""One step: probe the branches, reduce scalars, update; and what is watched meanwhile."""
