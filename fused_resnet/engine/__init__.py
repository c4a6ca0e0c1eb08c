"""The whole network as one planned, tuned and captured inference program."""
