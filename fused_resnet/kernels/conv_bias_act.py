"""Implicit-GEMM convolution of folded weights: y = act(conv(x) + bias + residual), or + conv1x1(x2), for inference.

The GEMM: M = N*P*Q output positions, N = output channels, reduction = filter taps x input channels, and behind it, as a
second segment of the same reduction, the channels of x2: the projection shortcut of a residual block. All activations
are dense channels_last. Two kernels compute the same: one gathers x by pointers (any shape, any GPU, split reductions),
the other has the tensor memory accelerator fetch boxes of x (sm_90 and newer).
"""

import triton
import triton.language as tl

from .conv_bn_act import _banded, _operand


@triton.jit
def _finished(acc, bias, RELU: tl.constexpr):
    """The epilogue in float32. ReLU lets NaN through, as in PyTorch."""
    acc += bias
    if RELU:
        acc = tl.maximum(acc, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return acc


@triton.jit
def _over_taps(
    acc,  # [BLOCK_M, BLOCK_N] float32
    x_rows,  # [BLOCK_M] pointers, before the first tap: may point outside the map, where it is masked
    w_rows,  # [BLOCK_N] pointers
    h0,  # [BLOCK_M], read with PADDED
    w0,
    first,  # steps of the reduction
    last,
    H,
    W,
    C,  # channels of x from one position to the next
    OF,  # those that are reduced over: C, or a bundle's
    dilation_h,
    dilation_w,
    S: tl.constexpr,
    TAPS: tl.constexpr,
    PADDED: tl.constexpr,
    EVEN_C: tl.constexpr,  # BLOCK_K divides OF
    INPUT_PRECISION: tl.constexpr,
    ROUND_TF32: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """acc plus some steps of the convolution."""
    lane = tl.arange(0, BLOCK_K)
    # One loop over (channel block, tap): nested loops would drain the pipeline at every tap. Taps are innermost: the
    # R*S shifted reads of one channel block overlap, and dividing by the constant TAPS is cheap.
    for step in tl.range(first, last):
        c = step // TAPS * BLOCK_K + lane
        tap = step % TAPS
        dh = tap // S * dilation_h
        dw = tap % S * dilation_w
        a_ptrs = x_rows[:, None] + ((dh * W + dw) * C + c)[None, :]
        if PADDED:
            h = h0 + dh
            w = w0 + dw
            a_ok = ((h >= 0) & (h < H) & (w >= 0) & (w < W))[:, None]
            if not EVEN_C:
                a_ok = a_ok & (c < OF)[None, :]
            a = tl.load(a_ptrs, mask=a_ok, other=0.0)
        elif EVEN_C:
            a = tl.load(a_ptrs)
        else:
            a = tl.load(a_ptrs, mask=(c < OF)[None, :], other=0.0)
        b_ptrs = w_rows[None, :] + (tap * OF + c)[:, None]
        if EVEN_C:
            b = tl.load(b_ptrs)
        else:
            b = tl.load(b_ptrs, mask=(c < OF)[:, None], other=0.0)
        a = _operand(a, ROUND_TF32, UPCAST)
        acc = tl.dot(a, _operand(b, False, UPCAST), acc, input_precision=INPUT_PRECISION)
    return acc


@triton.jit(
    do_not_specialize=["M", "P", "Q", "H", "W", "H2", "W2", "stride_h", "stride_w", "pad_h", "pad_w"]
    + ["dilation_h", "dilation_w", "stride2_h", "stride2_w", "split_steps"]
)
def _conv_bias_act_kernel(
    x_ptr,  # [N, H, W, C]
    weight_ptr,  # [K, R, S, C]
    bias_ptr,  # [K] float32
    residual_ptr,  # [M, K] or None
    x2_ptr,  # [N, H2, W2, C2] or None: no second segment
    weight2_ptr,  # [K, C2] or None
    y_ptr,  # [M, K]; with SPLIT [splits, M, K] float32: sums of a part of the reduction, nothing added
    M,  # N * P * Q
    P,
    Q,
    H,
    W,
    K,
    C,
    H2,
    W2,
    C2,
    stride_h,
    stride_w,
    pad_h,
    pad_w,
    dilation_h,
    dilation_w,
    stride2_h,
    stride2_w,
    split_steps,  # steps of the reduction that one split takes
    R: tl.constexpr,
    S: tl.constexpr,
    ROWS: tl.constexpr,  # 1x1, stride 1, no padding: output row m reads input row m
    ROWS2: tl.constexpr,  # the same for the second segment
    PADDED: tl.constexpr,  # a tap may fall outside the map
    EVEN_C: tl.constexpr,  # BLOCK_K divides C, and so on
    EVEN_C2: tl.constexpr,
    EVEN_K: tl.constexpr,
    ALIGN_C: tl.constexpr,  # what divides C, up to 16: Triton finds out only whether 16 does
    ALIGN_C2: tl.constexpr,
    ALIGN_K: tl.constexpr,
    RELU: tl.constexpr,
    SPLIT: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    ROUND_TF32: tl.constexpr,  # round x to TF32; the weights were, when they were packed
    UPCAST: tl.constexpr,  # operands to fp32: the interpreter's tl.dot returns garbage for bf16
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    TAPS: tl.constexpr = R * S
    if ALIGN_C < 16:
        C = C // ALIGN_C * ALIGN_C
    if ALIGN_K < 16:
        K = K // ALIGN_K * ALIGN_K
    tile_m, tile_n = _banded(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_N), GROUP_M)
    lane = tl.arange(0, BLOCK_K)

    # Rows past the end read row M - 1 instead of being masked in every load; only their store is masked.
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_read = tl.minimum(m, M - 1)
    n = m_read // (P * Q)
    p = m_read // Q % P
    q = m_read % Q
    k = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k_read = k if EVEN_K else tl.minimum(k, K - 1)
    w_rows = weight_ptr + k_read.to(tl.int64) * (TAPS * C)
    h0 = 0
    w0 = 0
    if ROWS:
        x_rows = x_ptr + m_read.to(tl.int64) * C
    else:
        h0 = p * stride_h - pad_h
        w0 = q * stride_w - pad_w
        # Before the first tap: may point outside the map, where it is masked.
        x_rows = x_ptr + ((n.to(tl.int64) * H + h0) * W + w0) * C

    steps = tl.cdiv(C, BLOCK_K) * TAPS
    first = 0
    last = steps
    if SPLIT:
        first = tl.program_id(1) * split_steps
        last = tl.minimum(first + split_steps, steps)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    where = (x_rows, w_rows, h0, w0, first, last, H, W, C, C, dilation_h, dilation_w)
    acc = _over_taps(acc, *where, S, TAPS, PADDED, EVEN_C, INPUT_PRECISION, ROUND_TF32, UPCAST, BLOCK_K)

    if x2_ptr is not None:
        if ALIGN_C2 < 16:
            C2 = C2 // ALIGN_C2 * ALIGN_C2
        if ROWS2:
            x2_rows = x2_ptr + m_read.to(tl.int64) * C2
        else:
            x2_rows = x2_ptr + ((n.to(tl.int64) * H2 + p * stride2_h) * W2 + q * stride2_w) * C2
        w2_rows = weight2_ptr + k_read.to(tl.int64) * C2
        steps2 = tl.cdiv(C2, BLOCK_K)
        first2 = 0
        last2 = steps2
        if SPLIT:
            first2 = tl.maximum(first - steps, 0)
            last2 = tl.minimum(first + split_steps - steps, steps2)
        for step in tl.range(first2, last2):
            c = step * BLOCK_K + lane
            if EVEN_C2:
                a = tl.load(x2_rows[:, None] + c[None, :])
                b = tl.load(w2_rows[None, :] + c[:, None])
            else:
                a = tl.load(x2_rows[:, None] + c[None, :], mask=(c < C2)[None, :], other=0.0)
                b = tl.load(w2_rows[None, :] + c[:, None], mask=(c < C2)[:, None], other=0.0)
            a = _operand(a, ROUND_TF32, UPCAST)
            acc = tl.dot(a, _operand(b, False, UPCAST), acc, input_precision=INPUT_PRECISION)

    # 64 bits for the tile's first row alone: an offset of 64 bits an element would fill the registers.
    first_row = (tile_m * BLOCK_M).to(tl.int64) * K
    out = tl.arange(0, BLOCK_M)[:, None] * K + k[None, :]
    out_ok = (m < M)[:, None]
    if not EVEN_K:
        out_ok = out_ok & (k < K)[None, :]
    if SPLIT:
        tl.store(y_ptr + tl.program_id(1).to(tl.int64) * M * K + first_row + out, acc, mask=out_ok)
    else:
        bias = tl.load(bias_ptr + k_read)[None, :]
        if residual_ptr is not None:
            acc += tl.load(residual_ptr + first_row + out, mask=out_ok, other=0.0).to(tl.float32)
        tl.store(y_ptr + first_row + out, _finished(acc, bias, RELU).to(y_ptr.dtype.element_ty), mask=out_ok)


@triton.jit(do_not_specialize=["M"])
def _conv_bias_act_finish_kernel(
    partial_ptr,  # [SPLITS, M, K] float32
    bias_ptr,  # [K] float32
    residual_ptr,  # [M, K] or None
    y_ptr,  # [M, K]
    M,
    K,
    SPLITS: tl.constexpr,
    ALIGN_K: tl.constexpr,  # what divides K, up to 16
    RELU: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Adds the splits in their order, so a second run gives the same bits."""
    if ALIGN_K < 16:
        K = K // ALIGN_K * ALIGN_K
    blocks_k = tl.cdiv(K, BLOCK_C)
    pid = tl.program_id(0)
    k = pid % blocks_k * BLOCK_C + tl.arange(0, BLOCK_C)
    m = (pid // blocks_k).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    at = m[:, None] * K + k[None, :]
    ok = (m < M)[:, None] & (k < K)[None, :]
    acc = tl.load(partial_ptr + at, mask=ok, other=0.0)
    for split in tl.static_range(1, SPLITS):
        acc += tl.load(partial_ptr + split * M.to(tl.int64) * K + at, mask=ok, other=0.0)
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + at, mask=ok, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + k, mask=k < K, other=0.0)[None, :]
    tl.store(y_ptr + at, _finished(acc, bias, RELU).to(y_ptr.dtype.element_ty), mask=ok)
