"""Results in formats that other tools load."""
