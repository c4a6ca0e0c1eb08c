"""Triton device code, one file a kernel family, and the choice of its tiles. Imports nothing of the package."""
