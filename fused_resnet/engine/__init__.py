"""The whole network as one planned, tuned program for inference."""
