"""Backward of a convolution that applies batch norm and ReLU while it loads: y = conv(a), a = relu(bn(x)).

a is never in memory. The input gradient ends in the mask and the sums that the batch norm's backward needs; the weight
gradient makes a again, from x, while it loads. The reductions over rows have two stages: programs write partials, and a
small kernel adds them in a fixed order. No atomics, so a second run gives the same bits.
"""

import triton
import triton.language as tl

from .conv_bn_act import _banded, _operand


@triton.jit
def _bn_vectors(mean_ptr, var_ptr, bn_weight_ptr, bn_bias_ptr, eps, c, C):
    """(mean, scale, bias) of the channels c in float32: bn(x) = (x - mean) * scale + bias. Centred first:
    x * scale + (bias - mean * scale) cancels where mean >> std."""
    mean = tl.load(mean_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.load(var_ptr + c, mask=c < C, other=1.0).to(tl.float32) + eps)
    if bn_weight_ptr is not None:
        scale *= tl.load(bn_weight_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    bias = tl.zeros_like(mean)
    if bn_bias_ptr is not None:
        bias = tl.load(bn_bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    return mean, scale, bias


@triton.jit
def _reaching(u, pad, TAPS: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr, STEP: tl.constexpr):
    """Along one axis, the positions h of class u, which are those where STRIDE divides h + pad - u, and the taps r that
    reach them, which are those where it divides u - r * DILATION: one in STEP.

    (first position, first tap, number of taps, output position that the first tap leads to from the first position)
    """
    first = (u + STRIDE - pad % STRIDE) % STRIDE
    tap = TAPS
    for r in tl.static_range(STEP):
        tap = tl.where((r * DILATION - u) % STRIDE == 0, r, tap)
    return first, tap, (TAPS - tap + STEP - 1) // STEP, (first + pad - tap * DILATION) // STRIDE


@triton.jit
def _mask_and_sum(
    g,  # [rows, columns], the gradient of a
    c,  # [columns], which channels
    origin,  # the tile's first position in x
    row,  # [rows], positions from there
    row_ok,  # [rows, 1]
    partial_row,
    x_ptr,
    mean_ptr,
    var_ptr,
    bn_weight_ptr,
    bn_bias_ptr,
    g_ptr,
    partial_g_ptr,
    partial_gx_ptr,
    eps,
    C,
    end,  # channels that there are, of the tile's
    EVEN_C: tl.constexpr,
    RELU: tl.constexpr,
):
    """Stores g where the ReLU let it through, and its sums over the rows."""
    # 64 bits for the first row alone: an offset of 64 bits an element would fill the registers.
    base = origin.to(tl.int64) * C
    at = row[:, None] * C + c[None, :]
    ok = row_ok if EVEN_C else row_ok & (c < end)[None, :]
    if mean_ptr is not None:
        mean, scale, bias = _bn_vectors(mean_ptr, var_ptr, bn_weight_ptr, bn_bias_ptr, eps, c, end)
        x = tl.load(x_ptr + base + at, mask=ok, other=0.0)
        centred = x.to(tl.float32) - mean[None, :]
        if RELU:
            # As the forward rounded it; a NaN lets the gradient through, as in PyTorch.
            z = (centred * scale[None, :] + bias[None, :]).to(x.dtype)
            g = tl.where(z <= 0, tl.zeros_like(g), g)
        # Of g as it is stored; rows past the end hold copies of the last one's.
        added = tl.where(ok, g.to(tl.float32), 0.0)
        partial = partial_row.to(tl.int64) * C + c
        tl.store(partial_g_ptr + partial, tl.sum(added, axis=0), mask=c < end)
        tl.store(partial_gx_ptr + partial, tl.sum(added * centred, axis=0), mask=c < end)
    if g_ptr is not None:
        tl.store(g_ptr + base + at, g, mask=ok)


@triton.jit(do_not_specialize=["N", "H", "W", "P", "Q", "tiles_m"])
def _bn_act_conv_bwd_input_kernel(
    grad_ptr,  # [N*P*Q, K], dense
    x_ptr,  # [N*H*W, C], dense, or None with mean
    weight_ptr,  # [K, R, S, C], dense
    mean_ptr,  # [C] or None: a is x
    var_ptr,  # [C] or None
    bn_weight_ptr,  # [C] or None
    bn_bias_ptr,  # [C] or None
    g_ptr,  # [N*H*W, C], dense: gradient of bn(x), or of x where there is no BN; None: not wanted
    partial_g_ptr,  # [classes * tiles_m, C] float32: sum of g over a tile's rows, or None with mean
    partial_gx_ptr,  # [classes * tiles_m, C] float32: sum of g * (x - mean), or None with mean
    eps,
    N,
    H,
    W,
    P,
    Q,
    C,
    K,
    pad_h,
    pad_w,
    tiles_m,  # row tiles of the largest class
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    STEP_H: tl.constexpr,  # STRIDE / gcd(STRIDE, DILATION)
    STEP_W: tl.constexpr,
    ROWS: tl.constexpr,  # 1x1, stride 1, no padding: row m of g comes from row m of grad
    EVEN_C: tl.constexpr,  # BLOCK_N divides C
    EVEN_K: tl.constexpr,  # BLOCK_K divides K
    ALIGN_C: tl.constexpr,  # what divides C, up to 16: Triton finds out only whether 16 does
    ALIGN_K: tl.constexpr,  # the same of K
    RELU: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    ROUND_TF32: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,  # positions of x
    BLOCK_N: tl.constexpr,  # C
    BLOCK_K: tl.constexpr,  # K
    GROUP_M: tl.constexpr,
    BUNDLE: tl.constexpr,  # groups that are one product
    BUNDLE_C: tl.constexpr,  # 0, or channels of a bundle of groups, as in `_bn_act_conv_fwd_kernel`, whose weight it is
    BUNDLE_K: tl.constexpr,
):
    """An implicit GEMM over positions of x. With a stride, positions of one remainder are reached by the same few taps:
    each class of them has its own tiles, program_id(1), and no tap is multiplied by zeros."""
    if ALIGN_C < 16:
        C = C // ALIGN_C * ALIGN_C
    if ALIGN_K < 16:
        K = K // ALIGN_K * ALIGN_K
    tiles_n = tl.cdiv(C, BLOCK_N)
    if BUNDLE_C > 0:
        OF_BUNDLE: tl.constexpr = (BUNDLE_C + BLOCK_N - 1) // BLOCK_N
        tiles_n = C // BUNDLE_C * OF_BUNDLE
    tile_m, tile_n = _banded(tl.program_id(0), tiles_m, tiles_n, GROUP_M)
    first_c = 0  # of the bundle
    first_k = 0
    of_c = C  # channels that the tile's product has
    of_k = K
    if BUNDLE_C > 0:
        first_c = tile_n // OF_BUNDLE * BUNDLE_C
        first_k = tile_n // OF_BUNDLE * BUNDLE_K
        tile_n = tile_n % OF_BUNDLE
        of_c = BUNDLE_C
        of_k = BUNDLE_K
        grad_ptr += first_k
        weight_ptr += first_k.to(tl.int64) * (R * S * BUNDLE_C)
    # Class 0 is reached by the most taps: the longest programs start first.
    member = tl.program_id(1)
    h_first, r_first, taps_h, p_first = _reaching(member // STRIDE_W, pad_h, R, STRIDE_H, DILATION_H, STEP_H)
    w_first, s_first, taps_w, q_first = _reaching(member % STRIDE_W, pad_w, S, STRIDE_W, DILATION_W, STEP_W)
    rows_h = (H - h_first + STRIDE_H - 1) // STRIDE_H
    rows_w = (W - w_first + STRIDE_W - 1) // STRIDE_W
    M = N * rows_h * rows_w

    # Rows past the end read the last row instead of being masked in every load; a class may have no row at all.
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_read = tl.maximum(tl.minimum(m, M - 1), 0)
    if ROWS:
        grad_rows = grad_ptr + m_read.to(tl.int64) * K
        row = m
    else:
        rows_h = tl.maximum(rows_h, 1)
        rows_w = tl.maximum(rows_w, 1)
        n = m_read // (rows_h * rows_w)
        h = m_read // rows_w % rows_h
        w = m_read % rows_w
        p0 = h + p_first
        q0 = w + q_first
        grad_rows = grad_ptr + ((n.to(tl.int64) * P + p0) * Q + q0) * K
        row = m
        if STRIDE_H * STRIDE_W > 1:
            row = (n * H + h * STRIDE_H + h_first) * W + w * STRIDE_W + w_first
    c = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)

    BACK_H: tl.constexpr = DILATION_H * STEP_H // STRIDE_H  # how far the next tap that reaches lies back in the output
    BACK_W: tl.constexpr = DILATION_W * STEP_W // STRIDE_W
    steps = tl.cdiv(of_k, BLOCK_K) * taps_h * taps_w
    taps = tl.maximum(taps_h * taps_w, 1)
    taps_w = tl.maximum(taps_w, 1)
    lane = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    # One loop over (channel block, tap): nested loops would drain the pipeline at every tap.
    for step in tl.range(0, steps):
        k = step // taps * BLOCK_K + lane
        back_h = step % taps // taps_w
        back_w = step % taps % taps_w
        tap = (r_first + back_h * STEP_H) * S + s_first + back_w * STEP_W
        back_h *= BACK_H
        back_w *= BACK_W
        a_ptrs = grad_rows[:, None] + (k - (back_h * Q + back_w) * K)[None, :]
        if ROWS:
            if EVEN_K:
                a = tl.load(a_ptrs)
            else:
                a = tl.load(a_ptrs, mask=(k < of_k)[None, :], other=0.0)
        else:
            p = p0 - back_h
            q = q0 - back_w
            a_ok = ((p >= 0) & (p < P) & (q >= 0) & (q < Q))[:, None]
            if not EVEN_K:
                a_ok = a_ok & (k < of_k)[None, :]
            a = tl.load(a_ptrs, mask=a_ok, other=0.0)
        b_ptrs = weight_ptr + (k.to(tl.int64) * (R * S * of_c))[:, None] + (tap * of_c + c)[None, :]
        if EVEN_C and EVEN_K:
            b = tl.load(b_ptrs)
        elif EVEN_C:
            b = tl.load(b_ptrs, mask=(k < of_k)[:, None], other=0.0)
        else:
            b = tl.load(b_ptrs, mask=(k < of_k)[:, None] & (c < of_c)[None, :], other=0.0)
        a = _operand(a, ROUND_TF32, UPCAST)
        b = _operand(b, ROUND_TF32, UPCAST)
        acc = tl.dot(a, b, acc, input_precision=INPUT_PRECISION)

    if BUNDLE > 1:
        # As in `_conv_bn_act_fwd_kernel`: where a NaN came out, it may be another group's.
        if tl.max((acc != acc).to(tl.int32)) > 0:
            K_GROUP: tl.constexpr = BUNDLE_K // BUNDLE
            c_ok = c < of_c
            own = tl.minimum(c, of_c - 1) // (BUNDLE_C // BUNDLE) * K_GROUP
            acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            for step in tl.range(0, taps_h * taps_w * K_GROUP):
                k = own + step // taps
                back_h = step % taps // taps_w
                back_w = step % taps % taps_w
                tap = (r_first + back_h * STEP_H) * S + s_first + back_w * STEP_W
                back_h *= BACK_H
                back_w *= BACK_W
                ok = c_ok[None, :]
                if not ROWS:
                    p = p0 - back_h
                    q = q0 - back_w
                    ok = ok & ((p >= 0) & (p < P) & (q >= 0) & (q < Q))[:, None]
                a = tl.load(grad_rows[:, None] + (k - (back_h * Q + back_w) * K)[None, :], mask=ok, other=0.0)
                b = tl.load(weight_ptr + k.to(tl.int64) * (R * S * of_c) + tap * of_c + c, mask=c_ok, other=0.0)
                acc += a.to(tl.float32) * b.to(tl.float32)[None, :]

    if STRIDE_H * STRIDE_W > 1:
        origin = tl.min(row, axis=0)
    else:
        origin = tile_m * BLOCK_M
    ends = (x_ptr, mean_ptr, var_ptr, bn_weight_ptr, bn_bias_ptr, g_ptr, partial_g_ptr, partial_gx_ptr, eps, C,
            first_c + of_c)  # fmt: skip
    c += first_c
    where = (origin, row - origin, (m < M)[:, None], member * tiles_m + tile_m)
    dtype: tl.constexpr = grad_ptr.dtype.element_ty
    if BLOCK_M * BLOCK_N < 128 * 64:
        _mask_and_sum(acc.to(dtype), c, *where, *ends, EVEN_C, RELU)
    else:
        # One half after the other: g, x and their products of a whole tile are more than the registers hold.
        halves = tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
        left, right = tl.split(halves)
        c = first_c + tile_n * BLOCK_N + tl.arange(0, BLOCK_N // 2)
        _mask_and_sum(left.to(dtype), c, *where, *ends, EVEN_C, RELU)
        _mask_and_sum(right.to(dtype), c + BLOCK_N // 2, *where, *ends, EVEN_C, RELU)


@triton.jit(do_not_specialize=["M", "H", "W", "P", "Q", "steps"])
def _bn_act_conv_bwd_weight_kernel(
    grad_ptr,  # [M, K], dense
    x_ptr,  # [N*H*W, C], dense
    mean_ptr,  # [C] or None: a is x
    var_ptr,  # [C] or None
    bn_weight_ptr,  # [C] or None
    bn_bias_ptr,  # [C] or None
    partial_ptr,  # [splits, K, R, S, C] float32: the gradient from a split's rows
    eps,
    M,  # N * P * Q
    H,
    W,
    P,
    Q,
    C,
    K,
    stride_h,
    stride_w,
    pad_h,
    pad_w,
    dilation_h,
    dilation_w,
    steps,  # row blocks of one split
    R: tl.constexpr,
    S: tl.constexpr,
    PADDED: tl.constexpr,  # a tap may fall outside the map
    ROWS: tl.constexpr,  # 1x1, stride 1, no padding: row m of grad meets row m of x
    EVEN_C: tl.constexpr,  # BLOCK_N divides C
    EVEN_K: tl.constexpr,  # BLOCK_M divides K
    ALIGN_C: tl.constexpr,  # what divides C, up to 16: Triton finds out only whether 16 does
    ALIGN_K: tl.constexpr,  # the same of K
    RELU: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    ROUND_TF32: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,  # K
    BLOCK_N: tl.constexpr,  # C, of one tap
    BLOCK_K: tl.constexpr,  # rows
    BUNDLE_C: tl.constexpr,  # 0, or channels of a bundle of groups: partial is [splits, K, R, S, BUNDLE_C]
    BUNDLE_K: tl.constexpr,
):
    TAPS: tl.constexpr = R * S
    if ALIGN_C < 16:
        C = C // ALIGN_C * ALIGN_C
    if ALIGN_K < 16:
        K = K // ALIGN_K * ALIGN_K
    # Taps innermost: programs that run together read the same rows of grad and, shifted, of x.
    pid = tl.program_id(0)
    tap = pid % TAPS
    of_c = C  # channels that the tile's product has
    end_k = K
    if BUNDLE_C > 0:
        of_c = BUNDLE_C
    tiles_n = tl.cdiv(of_c, BLOCK_N)
    c = pid // TAPS % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    tile_m = pid // (TAPS * tiles_n)
    k = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    if BUNDLE_C > 0:
        OF_BUNDLE: tl.constexpr = (BUNDLE_K + BLOCK_M - 1) // BLOCK_M
        first_c = tile_m // OF_BUNDLE * BUNDLE_C
        first_k = tile_m // OF_BUNDLE * BUNDLE_K
        k = first_k + tile_m % OF_BUNDLE * BLOCK_M + tl.arange(0, BLOCK_M)
        end_k = first_k + BUNDLE_K
        x_ptr += first_c
        if mean_ptr is not None:
            mean_ptr += first_c
            var_ptr += first_c
            if bn_weight_ptr is not None:
                bn_weight_ptr += first_c
            if bn_bias_ptr is not None:
                bn_bias_ptr += first_c
    split = tl.program_id(1)
    dh = tap // S * dilation_h - pad_h
    dw = tap % S * dilation_w - pad_w
    if mean_ptr is not None:
        mean, scale, bias = _bn_vectors(mean_ptr, var_ptr, bn_weight_ptr, bn_bias_ptr, eps, c, of_c)

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    first = split * steps
    for step in tl.range(first, tl.minimum(first + steps, tl.cdiv(M, BLOCK_K))):
        m = step * BLOCK_K + tl.arange(0, BLOCK_K)
        there = m < M
        grad_ok = there[:, None]
        if not EVEN_K:
            grad_ok = grad_ok & (k < end_k)[None, :]
        grad = tl.load(grad_ptr + (m.to(tl.int64) * K)[:, None] + k[None, :], mask=grad_ok, other=0.0)
        if ROWS:
            row = m.to(tl.int64)
        else:
            h = m // Q % P * stride_h + dh
            w = m % Q * stride_w + dw
            row = ((m // (P * Q)).to(tl.int64) * H + h) * W + w
            if PADDED:
                there = there & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        x_ok = there[:, None]
        if not EVEN_C:
            x_ok = x_ok & (c < of_c)[None, :]
        a = tl.load(x_ptr + (row * C)[:, None] + c[None, :], mask=x_ok, other=0.0)
        if mean_ptr is not None:
            z = (a.to(tl.float32) - mean[None, :]) * scale[None, :] + bias[None, :]
            if RELU:
                z = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
            # The padding is zero behind BN and ReLU: masked again, now that zero has been normalised as well.
            a = tl.where(there[:, None], z, 0.0).to(a.dtype)
        grad = _operand(grad, ROUND_TF32, UPCAST)
        a = _operand(a, ROUND_TF32, UPCAST)
        acc = tl.dot(tl.trans(grad), a, acc, input_precision=INPUT_PRECISION)

    base = partial_ptr + split.to(tl.int64) * K * (TAPS * of_c)
    at = (k.to(tl.int64) * (TAPS * of_c))[:, None] + (tap * of_c + c)[None, :]
    if EVEN_C and EVEN_K:
        tl.store(base + at, acc)
    else:
        tl.store(base + at, acc, mask=(k < end_k)[:, None] & (c < of_c)[None, :])


@triton.jit(do_not_specialize=["splits"])
def _bn_act_conv_bwd_weight_finish_kernel(
    partial_ptr,  # [splits, E] float32
    dweight_ptr,  # [E]
    E,  # K * R * S * C
    splits,
    K_GROUP: tl.constexpr,  # of a group: outputs, and elements of the reduction of one tap
    C_GROUP: tl.constexpr,
    TAPS: tl.constexpr,
    BUNDLE: tl.constexpr,  # groups of a bundle, whose products off the diagonal are left out; 1: there are none
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    at = e
    if BUNDLE > 1:
        k = e // (TAPS * C_GROUP)
        at = (e // C_GROUP * BUNDLE + k // K_GROUP % BUNDLE) * C_GROUP + e % C_GROUP
    total = tl.zeros((BLOCK_S, BLOCK_E), dtype=tl.float32)
    for start in tl.range(0, splits, BLOCK_S):
        s = (start + tl.arange(0, BLOCK_S)).to(tl.int64)
        ok = (s < splits)[:, None] & (e < E)[None, :]
        total += tl.load(partial_ptr + s[:, None] * (E * BUNDLE) + at[None, :], mask=ok, other=0.0)
    tl.store(dweight_ptr + e, tl.sum(total, axis=0).to(dweight_ptr.dtype.element_ty), mask=e < E)
