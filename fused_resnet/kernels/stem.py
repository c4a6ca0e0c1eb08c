"""The stem: convolution 7x7 stride 2 padding 3, bias, ReLU and max-pool 3x3 stride 2 padding 1 in one kernel.

Three input channels do not fill a tensor core, so the reduction runs over lines: what a filter row reads of a row of x,
a run of elements as they lie in memory. In NCHW that is a line a channel, of 7 taps; in channels_last the channels
share one of 21 elements. One tap is put before them, so that lines start at even elements and load as vectors; its
value is dropped, and its weight is zero.

A tile is BLOCK_M pooled columns of one pooled row, counted through all images: column t of the pool spans the
convolution's columns 2t - 1, 2t and 2t + 1. Two accumulators hold the even and the odd ones; 2t - 1 is the odd one of
the row before, so a tile's first row is there for its neighbour only. The program walks down pooled rows and keeps the
last of the three convolution rows for the next. Maxima are taken after bias and rounding, which keep the order, and
before the ReLU: every window holds one position inside the map, so that -inf outside never comes out.
"""

import triton
import triton.language as tl

from .conv_bn_act import _operand


@triton.jit
def _max(a, b):
    """In a's dtype: Triton takes bfloat16 to float32 and leaves it there."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL).to(a.dtype)


@triton.jit
def _columns(x_base, at0, v0, line_at, r, j, inside, h0, H, pitch, KEEP_FROM: tl.constexpr):
    """The left operand [BLOCK_M, BLOCK_K] of one step: elements v0 + j of the lines that the filter rows r read."""
    h = h0 + r
    v = v0[:, None] + j[None, :]
    ok = (inside & (h >= 0) & (h < H))[None, :] & (v >= 0) & (v < pitch)
    a = tl.load(x_base + (at0[:, None] + (line_at + j)[None, :]), mask=ok, other=0.0)
    return tl.where((j >= KEEP_FROM)[None, :], a, tl.zeros_like(a))


@triton.jit
def _stem_row(
    x_base,  # the first image of the tile
    at0,  # [BLOCK_M], what is added for a row's image and its even column's line
    weight_rows,
    v0,
    odd_ok,
    bias,
    i,  # row of the convolution
    P1,
    H,
    pitch,
    plane,
    LINES: tl.constexpr,
    LINE: tl.constexpr,
    PER_ROW: tl.constexpr,
    SIZE: tl.constexpr,
    OUT: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    ROUND_TF32: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Even and odd columns of one row of the convolution, with bias, in OUT's precision; -inf outside the map."""
    CHANNELS: tl.constexpr = 3 // PER_ROW  # that share a line
    even = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    odd = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    h0 = 2 * i - 3
    lane = tl.arange(0, BLOCK_K)
    for start in tl.range(0, SIZE, BLOCK_K):
        e = start + lane
        line = e // LINE
        j = e % LINE
        r = line // PER_ROW
        line_at = (h0 + r) * pitch + line % PER_ROW * plane
        inside = line < LINES
        a0 = _columns(x_base, at0, v0, line_at, r, j, inside, h0, H, pitch, CHANNELS)
        # The odd column's line starts one column of the convolution, two of x, later.
        a1 = _columns(x_base, at0 + 2 * CHANNELS, v0 + 2 * CHANNELS, line_at, r, j, inside, h0, H, pitch, CHANNELS)
        b = _operand(tl.load(weight_rows[None, :] + e[:, None]), False, UPCAST)
        a0 = _operand(a0.to(weight_rows.dtype.element_ty), ROUND_TF32, UPCAST)
        a1 = _operand(a1.to(weight_rows.dtype.element_ty), ROUND_TF32, UPCAST)
        even = tl.dot(a0, b, even, input_precision=INPUT_PRECISION)
        odd = tl.dot(a1, b, odd, input_precision=INPUT_PRECISION)
    row_ok = (i >= 0) & (i < P1)
    even = tl.where(row_ok, even + bias[None, :], float("-inf"))
    odd = tl.where(odd_ok[:, None] & row_ok, odd + bias[None, :], float("-inf"))
    return even.to(OUT), odd.to(OUT)


@triton.jit(do_not_specialize=["M", "P", "Q", "P1", "Q1", "H", "rows"])
def _stem_pool_kernel(
    x_ptr,  # [N, 3, H, W], dense in NCHW or channels_last, of any floating dtype
    weight_ptr,  # [K, SIZE]: a filter's lines behind one another, zeros behind them
    bias_ptr,  # [K] float32
    y_ptr,  # [N, P, Q, K]
    M,  # N * Q
    P,  # size of the pooled map
    Q,
    P1,  # size of the convolution's map
    Q1,
    H,
    pitch,  # elements of a row of x: W, or 3 * W in channels_last
    K,
    rows,  # pooled rows a program walks
    LINES: tl.constexpr,  # lines of a filter
    LINE: tl.constexpr,  # elements of a line
    PER_ROW: tl.constexpr,  # lines of a filter row: 3, or 1 in channels_last
    SIZE: tl.constexpr,  # LINES * LINE, up to a multiple of BLOCK_K
    ALIGN: tl.constexpr,  # what divides pitch, up to 16
    EVEN_K: tl.constexpr,  # BLOCK_N divides K
    ALIGN_K: tl.constexpr,  # what divides K, up to 16
    INPUT_PRECISION: tl.constexpr,
    ROUND_TF32: tl.constexpr,  # round x to TF32; the weights were, when they were packed
    UPCAST: tl.constexpr,  # operands to fp32: the interpreter's tl.dot returns garbage for bf16
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    CHANNELS: tl.constexpr = 3 // PER_ROW
    OUT: tl.constexpr = y_ptr.dtype.element_ty
    if ALIGN < 16:
        pitch = pitch // ALIGN * ALIGN
    if ALIGN_K < 16:
        K = K // ALIGN_K * ALIGN_K
    lane = tl.arange(0, BLOCK_M)
    m = tl.program_id(0) * (BLOCK_M - 1) - 1 + lane
    m_read = tl.minimum(tl.maximum(m, 0), M - 1)
    n = m_read // Q
    t = m_read % Q
    v0 = (4 * t - 4) * CHANNELS
    plane = H * pitch
    # 64 bits for the tile's first image alone.
    n0 = tl.minimum(tl.maximum(tl.program_id(0) * (BLOCK_M - 1) - 1, 0), M - 1) // Q
    x_base = x_ptr + n0.to(tl.int64) * (plane * PER_ROW)
    at0 = (n - n0) * (plane * PER_ROW) + v0
    k = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    k_read = k if EVEN_K else tl.minimum(k, K - 1)
    weight_rows = weight_ptr + k_read * SIZE
    bias = tl.load(bias_ptr + k_read)
    odd_ok = 2 * t + 1 < Q1
    before = tl.broadcast_to(tl.maximum(lane - 1, 0)[:, None], (BLOCK_M, BLOCK_N))
    out = n.to(tl.int64) * P * Q + t
    out_ok = ((lane > 0) & (m < M))[:, None]
    if not EVEN_K:
        out_ok = out_ok & (k < K)[None, :]

    # One loop over the convolution's rows, as its body is large: `even` and `odd` are the maxima of those of the pooled
    # row that came already.
    even = tl.full((BLOCK_M, BLOCK_N), float("-inf"), dtype=tl.float32).to(OUT)
    odd = even
    first = tl.program_id(1) * rows
    for i in tl.range(2 * first - 1, 2 * tl.minimum(first + rows, P)):
        # fmt: off
        row_even, row_odd = _stem_row(
            x_base, at0, weight_rows, v0, odd_ok, bias, i, P1, H, pitch, plane, LINES, LINE, PER_ROW, SIZE, OUT,
            INPUT_PRECISION, ROUND_TF32, UPCAST, BLOCK_M, BLOCK_N, BLOCK_K)
        # fmt: on
        even = _max(even, row_even)
        odd = _max(odd, row_odd)
        if i % 2 != 0:
            p = i // 2
            if i > 2 * first:
                left = tl.gather(odd, before, axis=0)
                y = _max(even, odd)
                y = tl.where((t > 0)[:, None], _max(y, left), y)
                y = _max(y, tl.zeros_like(y))
                tl.store(y_ptr + (out + p * Q)[:, None] * K + k[None, :], y, mask=out_ok)
            even = row_even
            odd = row_odd
