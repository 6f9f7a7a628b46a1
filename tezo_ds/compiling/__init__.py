"""A forward that compiles: blocks of the fused probe as functions for `torch.compile`."""
