"""Models as users bring them: how they load, and what their modules are."""
