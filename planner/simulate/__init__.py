"""Let it happen: a plan event by event."""
