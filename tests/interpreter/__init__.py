"""The Triton kernels, interpreted: see conftest.py."""
