"""Talk with it."""
