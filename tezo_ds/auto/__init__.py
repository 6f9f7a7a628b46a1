"""What a run chooses by itself, from what it measures first."""
