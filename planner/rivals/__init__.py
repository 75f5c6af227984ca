"""And the others? What other engines would do."""
