"""What this machine's processor can do, whatever the model: a look at its rates, what processes read together."""
