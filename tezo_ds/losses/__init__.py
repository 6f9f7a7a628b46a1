"""What a branch is judged by."""
