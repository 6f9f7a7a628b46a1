"""A run as a command sees it: the session, the loop, what it shows, how it is stopped."""
