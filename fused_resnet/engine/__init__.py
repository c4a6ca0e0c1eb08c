"""The whole network as one planned, tuned, captured inference program."""
