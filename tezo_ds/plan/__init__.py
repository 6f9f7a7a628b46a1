"""What a run that is too large to try would take: memory, bytes on the wire and time, from shapes."""
