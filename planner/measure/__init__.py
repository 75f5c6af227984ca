"""Ask the machine itself: real layers, real processes, real links."""
