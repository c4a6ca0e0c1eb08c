"""ResNet residual blocks fused into custom Triton and C++/CUDA kernels: drop-in, differentiable, verified."""

from . import ops  # noqa: F401  isort: skip  (registers torch.ops.fused_resnet.*)
from . import functional, models
from .backends import backend
from .blocks import FusedBasicBlock, FusedBottleneck
from .capture import CapturedTraining, capture_training
from .convert import restore_blocks, swap_blocks, swap_report
from .engine import OptimizedModel, optimize_for_inference
from .preact import FusedPreActBasicBlock, FusedPreActBottleneck

__version__ = "0.1.0"
__all__ = [
    "CapturedTraining",
    "FusedBasicBlock",
    "FusedBottleneck",
    "FusedPreActBasicBlock",
    "FusedPreActBottleneck",
    "OptimizedModel",
    "backend",
    "capture_training",
    "functional",
    "models",
    "optimize_for_inference",
    "restore_blocks",
    "swap_blocks",
    "swap_report",
]
