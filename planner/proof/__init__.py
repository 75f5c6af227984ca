"""The second opinion: exact methods that share nothing with the program."""
