"""Steps that solve for the weights of their directions, by the changes of the logits along them."""
