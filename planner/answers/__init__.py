"""The best plan, or why there is none."""
