"""A run's files, written and read: config, journal, snapshots, results."""
