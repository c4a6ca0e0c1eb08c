"""BatchNorm, ReLU and max-pool 3x3 stride 2 padding 1 in one pass over channels_last rows, and its backward in two.

The largest maps of a network, between the first convolution and the pool, are read once and never written: what is kept
beside x is which of a window's nine positions won, a byte a pooled value. The backward asks, for every position of x,
the one, two or four windows that it lies in. No atomics, so a second run gives the same bits.
"""

import triton
import triton.language as tl

from .bn_act import _inverse_and_scale


@triton.jit(do_not_specialize=["M", "P", "Q", "H", "W"])
def _bn_act_pool_fwd_kernel(
    x_ptr,  # [N * H * W, C]
    mean_ptr,  # [C]
    var_ptr,  # [C]
    bn_weight_ptr,  # [C] or None
    bn_bias_ptr,  # [C] or None
    y_ptr,  # [M, C]
    winner_ptr,  # [M, C] uint8: 3 * row + column in the window, 9 where nothing is above zero
    eps,
    M,  # N * P * Q
    P,
    Q,
    H,
    W,
    C,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALIGN: tl.constexpr,  # what divides C, up to 16
):
    OUT: tl.constexpr = y_ptr.dtype.element_ty
    if ALIGN < 16:
        C = C // ALIGN * ALIGN
    blocks_c = tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    c = pid % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    m = (pid // blocks_c).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    mean = tl.load(mean_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    var = tl.load(var_ptr + c, mask=c < C, other=1.0).to(tl.float32)
    _, scale = _inverse_and_scale(bn_weight_ptr, var, c, c < C, eps)
    bias = tl.zeros_like(mean)
    if bn_bias_ptr is not None:
        bias = tl.load(bn_bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    image, h0, w0 = m // Q // P, m // Q % P * 2 - 1, m % Q * 2 - 1
    best = tl.full((BLOCK_R, BLOCK_C), -1.0, dtype=tl.float32)
    winner = tl.full((BLOCK_R, BLOCK_C), 9, dtype=tl.int32)
    for r in tl.static_range(3):
        for s in tl.static_range(3):
            h, w = h0 + r, w0 + s
            inside = (m < M) & (h >= 0) & (h < H) & (w >= 0) & (w < W)
            ok = inside[:, None] & (c < C)[None, :]
            x = tl.load(x_ptr + ((image * H + h) * W + w)[:, None] * C + c[None, :], mask=ok, other=0.0)
            a = (x.to(tl.float32) - mean[None, :]) * scale[None, :] + bias[None, :]
            # Compared as PyTorch's pool sees them: rounded, the first of equal ones, the last NaN.
            a = tl.maximum(a, 0.0, propagate_nan=tl.PropagateNan.ALL).to(OUT).to(tl.float32)
            wins = ok & ((a > best) | (a != a))
            best = tl.where(wins, a, best)
            winner = tl.where(wins, 3 * r + s, winner)
    winner = tl.where(best <= 0, 9, winner)
    at = m[:, None] * C + c[None, :]
    ok = (m < M)[:, None] & (c < C)[None, :]
    tl.store(y_ptr + at, best.to(OUT), mask=ok)
    tl.store(winner_ptr + at, winner.to(tl.uint8), mask=ok)


@triton.jit
def _gradient(grad_ptr, winner_ptr, m, c, M, P, Q, H, W, C, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """The pool's gradient at rows m of [N * H * W, C]."""
    h, w = m // W % H, m % W
    image = m // W // H
    g = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    for i in tl.static_range(2):
        for j in tl.static_range(2):
            # Even rows lie in one window, in its middle; odd ones at the end of one and the beginning of the next.
            p, q = (h + i) // 2, (w + j) // 2
            inside = (m < M) & (p < P) & (q < Q)
            if i == 1:
                inside &= h % 2 == 1
            if j == 1:
                inside &= w % 2 == 1
            place = 3 * (h - 2 * p + 1) + w - 2 * q + 1
            at = ((image * P + p) * Q + q)[:, None] * C + c[None, :]
            ok = inside[:, None] & (c < C)[None, :]
            winner = tl.load(winner_ptr + at, mask=ok, other=9)
            won = winner.to(tl.int32) == place.to(tl.int32)[:, None]
            g += tl.where(won, tl.load(grad_ptr + at, mask=ok, other=0.0).to(tl.float32), 0.0)
    return g


@triton.jit(do_not_specialize=["M", "P", "Q", "H", "W", "steps"])
def _bn_act_pool_bwd_reduce_kernel(
    grad_ptr,  # [N * P * Q, C]
    winner_ptr,  # [N * P * Q, C] uint8
    x_ptr,  # [M, C]
    mean_ptr,  # [C]
    partial_g_ptr,  # [splits, C] float32: sum of g
    partial_gx_ptr,  # [splits, C] float32: sum of g * (x - mean)
    M,  # N * H * W
    P,
    Q,
    H,
    W,
    C,
    steps,  # row blocks of one split
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALIGN: tl.constexpr,
):
    if ALIGN < 16:
        C = C // ALIGN * ALIGN
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    split = tl.program_id(1)
    mean = tl.load(mean_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    sum_g = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    sum_gx = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    for step in tl.range(0, steps):
        m = (split.to(tl.int64) * steps + step) * BLOCK_R + tl.arange(0, BLOCK_R)
        ok = (m < M)[:, None] & (c < C)[None, :]
        g = _gradient(grad_ptr, winner_ptr, m, c, M, P, Q, H, W, C, BLOCK_R, BLOCK_C)
        x = tl.load(x_ptr + m[:, None] * C + c[None, :], mask=ok, other=0.0).to(tl.float32)
        sum_g += g
        # A row that is not there has g = 0, but 0 * (0 - mean) is NaN where the mean is not finite.
        sum_gx += tl.where(ok, g * (x - mean[None, :]), 0.0)
    at = split.to(tl.int64) * C + c
    tl.store(partial_g_ptr + at, tl.sum(sum_g, axis=0), mask=c < C)
    tl.store(partial_gx_ptr + at, tl.sum(sum_gx, axis=0), mask=c < C)


@triton.jit(do_not_specialize=["M", "P", "Q", "H", "W"])
def _bn_act_pool_bwd_input_kernel(
    grad_ptr,  # [N * P * Q, C]
    winner_ptr,  # [N * P * Q, C] uint8
    x_ptr,  # [M, C]
    mean_ptr,  # [C]
    var_ptr,  # [C]
    bn_weight_ptr,  # [C] or None
    sum_g_ptr,  # [C] float32
    sum_gx_ptr,  # [C] float32
    dx_ptr,  # [M, C]
    eps,
    M,  # N * H * W
    P,
    Q,
    H,
    W,
    C,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALIGN: tl.constexpr,
):
    if ALIGN < 16:
        C = C // ALIGN * ALIGN
    blocks_c = tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    c = pid % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    m = (pid // blocks_c).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    mean = tl.load(mean_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    var = tl.load(var_ptr + c, mask=c < C, other=1.0).to(tl.float32)
    inv, scale = _inverse_and_scale(bn_weight_ptr, var, c, c < C, eps)
    mean_g = tl.load(sum_g_ptr + c, mask=c < C, other=0.0) / M
    slope = inv * inv * (tl.load(sum_gx_ptr + c, mask=c < C, other=0.0) / M)
    at = m[:, None] * C + c[None, :]
    ok = (m < M)[:, None] & (c < C)[None, :]
    g = _gradient(grad_ptr, winner_ptr, m, c, M, P, Q, H, W, C, BLOCK_R, BLOCK_C)
    x = tl.load(x_ptr + at, mask=ok, other=0.0).to(tl.float32)
    dx = (g - mean_g[None, :] - (x - mean[None, :]) * slope[None, :]) * scale[None, :]
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=ok)
