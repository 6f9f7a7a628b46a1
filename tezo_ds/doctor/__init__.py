"""`tezo-ds doctor`: whether a machine or a cluster is fit for a run."""
