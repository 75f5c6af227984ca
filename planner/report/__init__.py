"""On a page."""
