"""One step: probe the branches, reduce scalars, update; and the checks meanwhile."""
