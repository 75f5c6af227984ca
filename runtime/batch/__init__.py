"""Many prompts from a file, resumable."""
