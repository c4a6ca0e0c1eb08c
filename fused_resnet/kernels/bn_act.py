"""BatchNorm with residual and ReLU on channels_last rows [M, C], M = N*H*W: statistics, forward, backward.

Every reduction over rows has two stages: programs write partials of fixed row ranges, and a small kernel adds them in a
fixed order. No atomics, so a second run gives the same bits.
"""

import triton
import triton.language as tl


@triton.jit
def _masked(grad_ptr, y_ptr, at, ok):
    """grad where the ReLU let it through, in grad's dtype; a NaN output lets it through, as in PyTorch."""
    g = tl.load(grad_ptr + at, mask=ok, other=0.0)
    if y_ptr is not None:
        y = tl.load(y_ptr + at, mask=ok, other=0.0)
        g = tl.where(y <= 0, tl.zeros_like(g), g)
    return g


@triton.jit
def _inverse_and_scale(bn_weight_ptr, var, c, ok, eps):
    """1 / sqrt(var + eps), and that times the batch norm's weight."""
    inv = tl.rsqrt(var + eps)
    scale = inv
    if bn_weight_ptr is not None:
        scale *= tl.load(bn_weight_ptr + c, mask=ok, other=0.0).to(tl.float32)
    return inv, scale


@triton.jit
def _bias(bn_bias_ptr, like, c, ok):
    """The batch norm's bias, zeros where there is none."""
    bias = tl.zeros_like(like)
    if bn_bias_ptr is not None:
        bias = tl.load(bn_bias_ptr + c, mask=ok, other=0.0).to(tl.float32)
    return bias


@triton.jit
def _let_through(g, centred, scale, bias):
    """g where the ReLU behind the batch norm of x let it through; centred: x - mean. The sums are the forward's."""
    y = centred * scale[None, :] + bias[None, :]
    return tl.where(y <= 0, tl.zeros_like(g), g)


@triton.jit(do_not_specialize=["M", "steps"])
def _bn_stats_partial_kernel(
    x_ptr,  # [M, C]
    mean_ptr,  # [splits, C] float32: mean of x - pivot, the pivot being x's first row
    m2_ptr,  # [splits, C] float32: sum of squared distances from that mean
    M,
    C,
    steps,  # row blocks of one split
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALIGN: tl.constexpr,  # what divides C, up to 16: Triton finds out only whether 16 does
):
    if ALIGN < 16:
        C = C // ALIGN * ALIGN
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    split = tl.program_id(1)
    lane = tl.arange(0, BLOCK_R)
    first = split.to(tl.int64) * steps * BLOCK_R
    # Where mean >> deviation, x - pivot is exact and small, while a running mean of x would itself be rounded coarsely.
    pivot = tl.load(x_ptr + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    # Welford in every lane: the lanes advance together, so the count is a scalar and the loop needs no exchange.
    mean = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    m2 = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    for step in tl.range(0, steps):
        m = first + step * BLOCK_R + lane
        ok = (m < M)[:, None] & (c < C)[None, :]
        x = tl.load(x_ptr + m[:, None] * C + c[None, :], mask=ok, other=0.0).to(tl.float32) - pivot
        delta = tl.where(ok, x - mean, 0.0)
        mean += delta * (1.0 / (step + 1))
        m2 += delta * tl.where(ok, x - mean, 0.0)
    # Chan's merge, of all lanes at once. A lane's count is how many of its rows exist.
    rows = tl.minimum(M - first, steps * BLOCK_R)
    count = ((rows - lane + BLOCK_R - 1) // BLOCK_R).to(tl.float32)[:, None]
    merged = tl.sum(count * mean, axis=0) / rows.to(tl.float32)
    away = mean - merged[None, :]
    m2 = tl.sum(m2 + count * away * away, axis=0)
    at = split.to(tl.int64) * C + c
    tl.store(mean_ptr + at, merged, mask=c < C)
    tl.store(m2_ptr + at, m2, mask=c < C)


@triton.jit(do_not_specialize=["M", "splits", "rows_per_split"])
def _bn_stats_merge_kernel(
    x_ptr,  # [M, C], for its first row, the pivot; None: partial means are of x itself
    partial_mean_ptr,  # [splits, C] float32
    partial_m2_ptr,  # [splits, C] float32
    mean_ptr,  # [C] float32
    var_ptr,  # [C] float32, biased
    M,
    C,
    splits,
    rows_per_split,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    lane = tl.arange(0, BLOCK_S)
    total = tl.zeros((BLOCK_S, BLOCK_C), dtype=tl.float32)
    for start in tl.range(0, splits, BLOCK_S):
        s = (start + lane).to(tl.int64)[:, None]
        ok = (s < splits) & (c < C)[None, :]
        count = tl.minimum(M - s * rows_per_split, rows_per_split).to(tl.float32)
        total += count * tl.load(partial_mean_ptr + s * C + c[None, :], mask=ok, other=0.0)
    mean = tl.sum(total, axis=0) / M
    total = tl.zeros((BLOCK_S, BLOCK_C), dtype=tl.float32)
    for start in tl.range(0, splits, BLOCK_S):
        s = (start + lane).to(tl.int64)[:, None]
        ok = (s < splits) & (c < C)[None, :]
        count = tl.minimum(M - s * rows_per_split, rows_per_split).to(tl.float32)
        away = tl.load(partial_mean_ptr + s * C + c[None, :], mask=ok, other=0.0) - mean[None, :]
        m2 = tl.load(partial_m2_ptr + s * C + c[None, :], mask=ok, other=0.0)
        total += tl.where(ok, m2 + count * away * away, 0.0)
    if x_ptr is not None:
        pivot = tl.load(x_ptr + c, mask=c < C, other=0.0).to(tl.float32)
        tl.store(mean_ptr + c, pivot + mean, mask=c < C)
    else:
        tl.store(mean_ptr + c, mean, mask=c < C)
    tl.store(var_ptr + c, tl.sum(total, axis=0) / M, mask=c < C)


@triton.jit(do_not_specialize=["M"])
def _bn_act_fwd_kernel(
    x_ptr,  # [M, C]
    mean_ptr,  # [C]
    var_ptr,  # [C]
    bn_weight_ptr,  # [C] or None
    bn_bias_ptr,  # [C] or None
    residual_ptr,  # [M, C] or None
    y_ptr,  # [M, C]
    eps,
    M,
    C,
    RELU: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALIGN: tl.constexpr,  # what divides C, up to 16: Triton finds out only whether 16 does
):
    if ALIGN < 16:
        C = C // ALIGN * ALIGN
    blocks_c = tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    c = pid % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    m = (pid // blocks_c).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    at = m[:, None] * C + c[None, :]
    ok = (m < M)[:, None] & (c < C)[None, :]
    mean = tl.load(mean_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    var = tl.load(var_ptr + c, mask=c < C, other=1.0).to(tl.float32)
    _, scale = _inverse_and_scale(bn_weight_ptr, var, c, c < C, eps)
    # Centre first: x * scale + (bias - mean * scale) cancels where mean >> std.
    y = (tl.load(x_ptr + at, mask=ok, other=0.0).to(tl.float32) - mean[None, :]) * scale[None, :]
    if bn_bias_ptr is not None:
        y += tl.load(bn_bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    if residual_ptr is not None:
        y += tl.load(residual_ptr + at, mask=ok, other=0.0).to(tl.float32)
    if RELU:
        y = tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["M", "steps"])
def _bn_act_bwd_reduce_kernel(
    grad_ptr,  # [M, C]
    y_ptr,  # [M, C] or None: no ReLU, or one whose mask comes from x
    x_ptr,  # [M, C], or None with partial_gx
    mean_ptr,  # [C], or None with partial_gx
    var_ptr,  # [C], or None with dx
    bn_weight_ptr,  # [C] or None
    bn_bias_ptr,  # [C] or None; read for MASK_OF_X
    g_ptr,  # [M, C] or None: grad * mask, which is dresidual; the second pass then reads it in place of grad and y
    dx_ptr,  # [M, C] or None: complete where mean and var are constants, so that frozen statistics take one pass
    partial_g_ptr,  # [splits, C] float32: sum of g, or None
    partial_gx_ptr,  # [splits, C] float32: sum of g * (x - mean), or None
    eps,
    M,
    C,
    steps,  # row blocks of one split
    MASK_OF_X: tl.constexpr,  # the ReLU lets through what the batch norm of x makes positive
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALIGN: tl.constexpr,  # what divides C, up to 16: Triton finds out only whether 16 does
):
    if ALIGN < 16:
        C = C // ALIGN * ALIGN
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    split = tl.program_id(1)
    if x_ptr is not None:
        mean = tl.load(mean_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    if MASK_OF_X or dx_ptr is not None:
        var = tl.load(var_ptr + c, mask=c < C, other=1.0).to(tl.float32)
        _, scale = _inverse_and_scale(bn_weight_ptr, var, c, c < C, eps)
    if MASK_OF_X:
        bias = _bias(bn_bias_ptr, scale, c, c < C)
    sum_g = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    sum_gx = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    for step in tl.range(0, steps):
        m = (split.to(tl.int64) * steps + step) * BLOCK_R + tl.arange(0, BLOCK_R)
        at = m[:, None] * C + c[None, :]
        ok = (m < M)[:, None] & (c < C)[None, :]
        g = _masked(grad_ptr, y_ptr, at, ok)
        if x_ptr is not None:
            centred = tl.load(x_ptr + at, mask=ok, other=0.0).to(tl.float32) - mean[None, :]
        if MASK_OF_X:
            g = _let_through(g, centred, scale, bias)
        if g_ptr is not None:
            tl.store(g_ptr + at, g, mask=ok)
        g = g.to(tl.float32)
        if dx_ptr is not None:
            tl.store(dx_ptr + at, (g * scale[None, :]).to(dx_ptr.dtype.element_ty), mask=ok)
        if partial_g_ptr is not None:
            sum_g += g
        if partial_gx_ptr is not None:
            # A row that is not there has g = 0, but 0 * (0 - mean) is NaN where the mean is not finite.
            sum_gx += tl.where(ok, g * centred, 0.0)
    at = split.to(tl.int64) * C + c
    if partial_g_ptr is not None:
        tl.store(partial_g_ptr + at, tl.sum(sum_g, axis=0), mask=c < C)
    if partial_gx_ptr is not None:
        tl.store(partial_gx_ptr + at, tl.sum(sum_gx, axis=0), mask=c < C)


@triton.jit(do_not_specialize=["splits"])
def _bn_act_bwd_finish_kernel(
    partial_g_ptr,  # [splits, C] float32
    partial_gx_ptr,  # [splits, C] float32, or None
    var_ptr,  # [C], or None with partial_gx
    sum_g_ptr,  # [C] float32
    sum_gx_ptr,  # [C] float32, or None with partial_gx
    dbn_weight_ptr,  # [C] float32, or None with partial_gx
    eps,
    C,
    splits,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    sum_g = tl.zeros((BLOCK_S, BLOCK_C), dtype=tl.float32)
    sum_gx = tl.zeros((BLOCK_S, BLOCK_C), dtype=tl.float32)
    for start in tl.range(0, splits, BLOCK_S):
        s = (start + tl.arange(0, BLOCK_S)).to(tl.int64)
        at = s[:, None] * C + c[None, :]
        ok = (s < splits)[:, None] & (c < C)[None, :]
        sum_g += tl.load(partial_g_ptr + at, mask=ok, other=0.0)
        if partial_gx_ptr is not None:
            sum_gx += tl.load(partial_gx_ptr + at, mask=ok, other=0.0)
    tl.store(sum_g_ptr + c, tl.sum(sum_g, axis=0), mask=c < C)
    if partial_gx_ptr is not None:
        gx = tl.sum(sum_gx, axis=0)
        inv = tl.rsqrt(tl.load(var_ptr + c, mask=c < C, other=1.0).to(tl.float32) + eps)
        tl.store(sum_gx_ptr + c, gx, mask=c < C)
        tl.store(dbn_weight_ptr + c, gx * inv, mask=c < C)


@triton.jit(do_not_specialize=["M"])
def _bn_act_bwd_input_kernel(
    grad_ptr,  # [M, C]
    y_ptr,  # [M, C] or None: no ReLU, grad already masked, or a mask that comes from x
    x_ptr,  # [M, C]
    mean_ptr,  # [C]
    var_ptr,  # [C], or None: what follows from it is given in place of what it follows from
    bn_weight_ptr,  # [C] or None; without var the scale
    bn_bias_ptr,  # [C] or None; read for MASK_OF_X, which needs var
    sum_g_ptr,  # [C] float32; without var the mean of g
    sum_gx_ptr,  # [C] float32; without var the slope
    dx_ptr,  # [M, C]
    eps,
    M,
    C,
    MASK_OF_X: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALIGN: tl.constexpr,  # what divides C, up to 16: Triton finds out only whether 16 does
):
    if ALIGN < 16:
        C = C // ALIGN * ALIGN
    blocks_c = tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    c = pid % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    m = (pid // blocks_c).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    at = m[:, None] * C + c[None, :]
    ok = (m < M)[:, None] & (c < C)[None, :]
    mean = tl.load(mean_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    if var_ptr is not None:
        var = tl.load(var_ptr + c, mask=c < C, other=1.0).to(tl.float32)
        inv, scale = _inverse_and_scale(bn_weight_ptr, var, c, c < C, eps)
        mean_g = tl.load(sum_g_ptr + c, mask=c < C, other=0.0) / M
        slope = inv * inv * (tl.load(sum_gx_ptr + c, mask=c < C, other=0.0) / M)
    else:
        scale = tl.load(bn_weight_ptr + c, mask=c < C, other=0.0)
        mean_g = tl.load(sum_g_ptr + c, mask=c < C, other=0.0)
        slope = tl.load(sum_gx_ptr + c, mask=c < C, other=0.0)
    g = _masked(grad_ptr, y_ptr, at, ok).to(tl.float32)
    centred = tl.load(x_ptr + at, mask=ok, other=0.0).to(tl.float32) - mean[None, :]
    if MASK_OF_X:
        g = _let_through(g, centred, scale, _bias(bn_bias_ptr, scale, c, c < C))
    dx = (g - mean_g[None, :] - centred * slope[None, :]) * scale[None, :]
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=ok)
