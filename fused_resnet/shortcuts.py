"""ZeroPad: a shortcut without parameters where a block changes channels or size; Plain: blocks without a shortcut."""

from __future__ import annotations

from torch import Tensor, fx, nn
from torch.nn.functional import avg_pool2d, pad


class ZeroPad(nn.Module):
    """Option A of He et al. (arXiv 1512.03385, section 3.3): every stride-th pixel, and zeros for the new channels.

    inplanes, outplanes: channels in and out. forward: x [N, inplanes, H, W] -> [N, outplanes, ceil(H/stride),
    ceil(W/stride)], the dtype and layout of x. Stands in a block's `downsample`.

    Raises ValueError for fewer channels out than in, or a stride below 1.
    """

    def __init__(self, inplanes: int, outplanes: int, stride: int = 1) -> None:
        super().__init__()
        if outplanes < inplanes:
            raise ValueError(f"outplanes: zeros can only add channels to the {inplanes} there are, got {outplanes}")
        if stride < 1:
            raise ValueError(f"stride: expected at least 1, got {stride}")
        self.inplanes, self.outplanes, self.stride = inplanes, outplanes, stride

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, fx.Proxy) and (x.dim() != 4 or x.shape[1] != self.inplanes):
            raise RuntimeError(f"x: expected [N, {self.inplanes}, H, W], got {list(x.shape)}")
        if self.stride > 1:
            x = avg_pool2d(x, 1, self.stride)  # of one pixel: as x[:, :, ::stride, ::stride], but it keeps the layout
        return pad(x, (0, 0, 0, 0, 0, self.outplanes - self.inplanes))

    def extra_repr(self) -> str:
        return f"{self.inplanes}, {self.outplanes}, stride={self.stride}"


class Plain:
    """Makes a residual block its plain twin (He et al., arXiv 1512.03385, section 3.3): the same layers, no add.

    The constructor's arguments are the block's. Raises ValueError for a downsample.
    """

    residual = False

    def __init__(
        self, inplanes: int, planes: int, stride: int = 1, downsample: nn.Module | None = None, *args, **kwargs
    ):
        if downsample is not None:
            raise ValueError(f"downsample: a plain block has no shortcut, got {type(downsample).__name__}")
        super().__init__(inplanes, planes, stride, None, *args, **kwargs)
