"""In a terminal."""
