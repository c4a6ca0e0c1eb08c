"""conv_bias_act for sm_90 and newer: the tensor memory accelerator fetches the operands and stores the result.

An output tile is a box of BOX_N images x BOX_H rows x BOX_W columns: what a tap reads of x is then a box as well, and
what lies outside the map arrives as zeros. A box's sizes are powers of two; the host picks those that fit the map (7 x
7 maps: one position of many images). A 1x1 convolution of stride 1 is one image of one row. The grid is persistent:
programs walk the tiles, so that the next tile's first loads overlap the epilogue of the one before.
"""

import triton
import triton.language as tl

from .conv_bias_act import _finished
from .conv_bn_act import _banded, _operand


@triton.jit(do_not_specialize=["N", "P", "Q", "pad_h", "pad_w", "dilation_h", "dilation_w"])
def _conv_bias_act_tma_kernel(
    x_desc,  # [N, H, W, C] in boxes of the output's, BLOCK_K channels; with STRIDE 2 every second row and column is a
    #          box of the view [N, H / 2, 2, W / 2, 2 * C]
    weight_desc,  # [K, R * S * C] in blocks [BLOCK_N, BLOCK_K]
    bias_ptr,  # [K] float32
    residual_desc,  # like y_desc, or None
    x2_desc,  # [N, P, Q, C2], the view of every stride2-th row and column; or None: no second segment
    weight2_desc,  # [K, C2] in blocks [BLOCK_N, BLOCK_K], or None
    y_desc,  # [N, P, Q, K] in boxes of BLOCK_N channels
    N,
    P,
    Q,
    K,
    C,
    C2,
    pad_h,
    pad_w,
    dilation_h,
    dilation_w,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE: tl.constexpr,
    EVEN_K: tl.constexpr,  # BLOCK_N divides K
    RELU: tl.constexpr,
    ROUND_TF32: tl.constexpr,  # round x to TF32; the weights were, when they were packed
    UPCAST: tl.constexpr,  # operands to fp32: the interpreter's tl.dot returns garbage for bf16
    BOX_N: tl.constexpr,
    BOX_H: tl.constexpr,
    BOX_W: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    FLATTEN: tl.constexpr,  # one loop over (tile, step)
):
    TAPS: tl.constexpr = R * S
    BLOCK_M: tl.constexpr = BOX_N * BOX_H * BOX_W
    boxes_h = tl.cdiv(P, BOX_H)
    boxes_w = tl.cdiv(Q, BOX_W)
    tiles_m = tl.cdiv(N, BOX_N) * boxes_h * boxes_w
    tiles_n = tl.cdiv(K, BLOCK_N)
    steps = tl.cdiv(C, BLOCK_K) * TAPS
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=FLATTEN):
        tile_m, tile_n = _banded(tile, tiles_m, tiles_n, GROUP_M)
        n = tile_m // (boxes_h * boxes_w) * BOX_N
        p = tile_m // boxes_w % boxes_h * BOX_H
        q = tile_m % boxes_w * BOX_W
        k = tile_n * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for step in tl.range(0, steps):
            c = step // TAPS * BLOCK_K
            tap = step % TAPS
            dh = tap // S * dilation_h - pad_h
            dw = tap % S * dilation_w - pad_w
            if STRIDE == 1:
                a = x_desc.load([n, p + dh, q + dw, c])
            else:
                # Row 2p + dh is row (2p + dh) >> 1 of its parity: the shift rounds down, also below zero.
                a = x_desc.load([n, p + (dh >> 1), dh & 1, q + (dw >> 1), (dw & 1) * C + c])
            b = weight_desc.load([k, tap * C + c])
            a = _operand(a.reshape(BLOCK_M, BLOCK_K), ROUND_TF32, UPCAST)
            acc = tl.dot(a, _operand(b, False, UPCAST).T, acc, input_precision="tf32")
        if x2_desc is not None:
            for step in tl.range(0, tl.cdiv(C2, BLOCK_K)):
                a = x2_desc.load([n, p, q, step * BLOCK_K])
                b = weight2_desc.load([k, step * BLOCK_K])
                a = _operand(a.reshape(BLOCK_M, BLOCK_K), ROUND_TF32, UPCAST)
                acc = tl.dot(a, _operand(b, False, UPCAST).T, acc, input_precision="tf32")
        if residual_desc is not None:
            acc += residual_desc.load([n, p, q, k]).reshape(BLOCK_M, BLOCK_N).to(tl.float32)
        channels = k + tl.arange(0, BLOCK_N)
        if EVEN_K:
            bias = tl.load(bias_ptr + channels)
        else:
            bias = tl.load(bias_ptr + channels, mask=channels < K, other=0.0)
        y = _finished(acc, bias[None, :], RELU).to(y_desc.dtype)
        y_desc.store([n, p, q, k], y.reshape(BOX_N, BOX_H, BOX_W, BLOCK_N))
