"""Mean and covariance of the channels of a normalised tensor that is not stored.

The covariance of a 1x1 convolution's result follows from that of its input, so its BatchNorm's statistics are known
before it runs. Every reduction over rows has two stages, without atomics, as in bn_act.py: a second run gives the same
bits.
"""

import triton
import triton.language as tl

from .bn_act_conv import _affine, _normalised


@triton.jit
def _upper(pair):
    """(i, j), i <= j, of the pair-th tile of an upper triangle that is walked column by column."""
    # The root is off by 1e-6 where a column begins, and short of the next one by 1 / j.
    j = ((tl.sqrt(8.0 * pair + 1.0) - 1.0) * 0.5 + 1e-3).to(tl.int32)
    return pair - j * (j + 1) // 2, j


@triton.jit
def _first_row(x_ptr, c, C, stride_xc, affine_ptr, affine_stride, RELU: tl.constexpr):
    """[1, channels] of the first position: the pivot of float32 sums."""
    x = tl.load(x_ptr + c * stride_xc, mask=c < C, other=0.0)[None, :]
    if affine_ptr is not None:
        mean, scale, bias = _affine(affine_ptr, affine_stride, c)
        x = _normalised(x, mean, scale, bias, RELU)
    return x


@triton.jit(do_not_specialize=["M", "P", "Q", "steps"])
def _gram_partial_kernel(
    x_ptr,  # [N, C, H, W], any strides (a channel stride of 1 is what makes it fast)
    affine_ptr,  # [3, affine_stride] float32 of `_bn_affine_kernel`, or None: of x as it is
    partial_ptr,  # [splits, C, C] float32: sums of products; tiles below the diagonal are not written
    sum_ptr,  # [splits, C] float32
    M,  # N * P * Q, the positions (n, p * stride_h, q * stride_w)
    P,
    Q,
    C,
    affine_stride,
    stride_xn,
    stride_xh,
    stride_xw,
    stride_xc,
    steps,  # row blocks of one split
    ROWS: tl.constexpr,  # rows are evenly spaced
    PIVOT: tl.constexpr,  # sums are of the distances from the first row
    EVEN_C: tl.constexpr,  # BLOCK_C divides C
    ALIGN_X: tl.constexpr,  # what divides x's strides and C, up to 16: Triton finds out only whether 16 does
    RELU: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,  # operands to fp32: the interpreter's tl.dot returns garbage for bf16
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    if ALIGN_X < 16:
        C = C // ALIGN_X * ALIGN_X
        stride_xn = stride_xn // ALIGN_X * ALIGN_X
        stride_xh = stride_xh // ALIGN_X * ALIGN_X
        stride_xw = stride_xw // ALIGN_X * ALIGN_X
    i, j = _upper(tl.program_id(0))
    split = tl.program_id(1)
    c_i = i * BLOCK_C + tl.arange(0, BLOCK_C)
    c_j = j * BLOCK_C + tl.arange(0, BLOCK_C)
    if affine_ptr is not None:
        mean_i, scale_i, bias_i = _affine(affine_ptr, affine_stride, c_i)
        mean_j, scale_j, bias_j = _affine(affine_ptr, affine_stride, c_j)
    if PIVOT:
        pivot_i = _first_row(x_ptr, c_i, C, stride_xc, affine_ptr, affine_stride, RELU)
        pivot_j = _first_row(x_ptr, c_j, C, stride_xc, affine_ptr, affine_stride, RELU)

    gram = tl.zeros((BLOCK_C, BLOCK_C), dtype=tl.float32)
    sums = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    for step in tl.range(0, steps):
        m = (split * steps + step) * BLOCK_R + tl.arange(0, BLOCK_R)
        ok = (m < M)[:, None]
        m = tl.minimum(m, M - 1)
        if ROWS:
            rows = (x_ptr + m.to(tl.int64) * stride_xw)[:, None]
        else:
            n = (m // (P * Q)).to(tl.int64)
            p = (m // Q % P).to(tl.int64)
            q = (m % Q).to(tl.int64)
            rows = (x_ptr + n * stride_xn + p * stride_xh + q * stride_xw)[:, None]
        if EVEN_C:
            a_i = tl.load(rows + (c_i * stride_xc)[None, :])
            a_j = tl.load(rows + (c_j * stride_xc)[None, :])
        else:
            a_i = tl.load(rows + (c_i * stride_xc)[None, :], mask=(c_i < C)[None, :], other=0.0)
            a_j = tl.load(rows + (c_j * stride_xc)[None, :], mask=(c_j < C)[None, :], other=0.0)
        if affine_ptr is not None:
            a_i = _normalised(a_i, mean_i, scale_i, bias_i, RELU)
            a_j = _normalised(a_j, mean_j, scale_j, bias_j, RELU)
        if PIVOT:
            a_i -= pivot_i
            a_j -= pivot_j
        # Both: a row that is not there times zero would still be NaN where it is not finite.
        a_i = tl.where(ok, a_i, tl.zeros_like(a_i))
        a_j = tl.where(ok, a_j, tl.zeros_like(a_j))
        sums += a_j.to(tl.float32)
        if UPCAST:
            a_i = a_i.to(tl.float32)
            a_j = a_j.to(tl.float32)
        gram = tl.dot(tl.trans(a_i), a_j, gram, input_precision=INPUT_PRECISION)

    at = split.to(tl.int64) * C * C + (c_i[:, None] * C + c_j[None, :])
    tl.store(partial_ptr + at, gram, mask=(c_i < C)[:, None] & (c_j < C)[None, :])
    if i == j:
        tl.store(sum_ptr + split * C + c_j, tl.sum(sums, axis=0), mask=c_j < C)


@triton.jit(do_not_specialize=["M", "splits"])
def _gram_merge_kernel(
    x_ptr,  # [N, C, H, W], for its first row, the pivot; None: sums have none
    affine_ptr,  # as in the kernel above
    partial_ptr,  # [splits, C, C] float32, upper triangle
    sum_ptr,  # [splits, C] float32
    mean_ptr,  # [C] float32
    cov_ptr,  # [C, C] float32
    M,
    C,
    splits,
    affine_stride,
    stride_xc,
    RELU: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Adds the splits in float64, in a fixed order: products of sums are taken from sums of products."""
    i, j = _upper(tl.program_id(0))
    lane = tl.arange(0, BLOCK_S)
    c_i = i * BLOCK_C + tl.arange(0, BLOCK_C)
    c_j = j * BLOCK_C + tl.arange(0, BLOCK_C)
    ok = (c_i < C)[:, None] & (c_j < C)[None, :]
    # On the diagonal both halves are read from the upper one: exactly symmetric.
    low = tl.minimum(c_i[:, None], c_j[None, :])
    high = tl.maximum(c_i[:, None], c_j[None, :])
    at = low * C + high
    gram = tl.zeros((BLOCK_S, BLOCK_C, BLOCK_C), dtype=tl.float64)
    sum_i = tl.zeros((BLOCK_S, BLOCK_C), dtype=tl.float64)
    sum_j = tl.zeros((BLOCK_S, BLOCK_C), dtype=tl.float64)
    for start in tl.range(0, splits, BLOCK_S):
        s = start + lane
        there = s < splits
        s = s.to(tl.int64)
        of_split = partial_ptr + s[:, None, None] * C * C
        gram += tl.load(of_split + at[None, :, :], mask=there[:, None, None] & ok[None, :, :], other=0.0)
        rows = sum_ptr + s[:, None] * C
        sum_i += tl.load(rows + c_i[None, :], mask=there[:, None] & (c_i < C)[None, :], other=0.0)
        sum_j += tl.load(rows + c_j[None, :], mask=there[:, None] & (c_j < C)[None, :], other=0.0)
    mean_i = tl.sum(sum_i, axis=0) / M
    mean_j = tl.sum(sum_j, axis=0) / M
    cov = (tl.sum(gram, axis=0) / M - mean_i[:, None] * mean_j[None, :]).to(tl.float32)
    # What is left of a constant is rounding: no variance is negative.
    cov = tl.where(low == high, tl.maximum(cov, 0.0, propagate_nan=tl.PropagateNan.ALL), cov)
    tl.store(cov_ptr + c_i[:, None] * C + c_j[None, :], cov, mask=ok)
    tl.store(cov_ptr + c_j[None, :] * C + c_i[:, None], cov, mask=ok)
    if i == j:
        mean = mean_j
        if x_ptr is not None:
            pivot = tl.sum(_first_row(x_ptr, c_j, C, stride_xc, affine_ptr, affine_stride, RELU), axis=0)
            mean += pivot
        tl.store(mean_ptr + c_j, mean.to(tl.float32), mask=c_j < C)
