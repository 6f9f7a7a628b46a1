"""The output layer in closed form: a term on the label words' logits, fitted without a backward pass."""
