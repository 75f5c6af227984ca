"""The question, in integers."""
