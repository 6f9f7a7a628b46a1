"""Directions: random factors, coefficients, and the changes of a weight that follow."""
