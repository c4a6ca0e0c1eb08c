"""The whole network as one planned, tuned program for inference."""

from .runner import OptimizedModel, optimize_for_inference

__all__ = ["OptimizedModel", "optimize_for_inference"]
