"""Objectives of what a model generates: each branch's completions, and the rewards that a function gives."""
