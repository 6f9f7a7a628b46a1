"""Models as users bring them: loading, and the structure of their modules."""
