"""Grouped convolution of folded weights as an implicit GEMM: y = act(conv(x) + bias + residual), for inference.

A tensor core multiplies blocks of 16 channels and more, a group may have four. So a few groups next to each other, a
bundle, are one product with a weight whose blocks off the diagonal are zero. The reduction of a bundle's outputs runs
over the filter's taps and the bundle's channels, not over all of x's; activations are dense channels_last.
"""

import triton
import triton.language as tl

from .conv_bias_act import _finished, _over_taps


@triton.jit(
    do_not_specialize=["M", "P", "Q", "H", "W", "stride_h", "stride_w", "pad_h", "pad_w", "dilation_h", "dilation_w"]
)
def _conv_bias_act_grouped_kernel(
    x_ptr,  # [N, H, W, C]
    weight_ptr,  # [K, R, S, BUNDLE_C]
    bias_ptr,  # [K] float32
    residual_ptr,  # [M, K] or None
    y_ptr,  # [M, K]
    M,  # N * P * Q
    P,
    Q,
    H,
    W,
    K,
    C,
    stride_h,
    stride_w,
    pad_h,
    pad_w,
    dilation_h,
    dilation_w,
    R: tl.constexpr,
    S: tl.constexpr,
    PADDED: tl.constexpr,  # a tap may fall outside the map
    BUNDLE: tl.constexpr,  # groups in a bundle
    BUNDLE_C: tl.constexpr,  # channels of x and of y in it
    BUNDLE_K: tl.constexpr,
    ALIGN_C: tl.constexpr,  # what divides C, up to 16: Triton finds out only whether 16 does
    ALIGN_K: tl.constexpr,
    RELU: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    ROUND_TF32: tl.constexpr,  # round x to TF32; the weights were, when they were packed
    UPCAST: tl.constexpr,  # operands to fp32: the interpreter's tl.dot returns garbage for bf16
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    TAPS: tl.constexpr = R * S
    EVEN_C: tl.constexpr = BUNDLE_C % BLOCK_K == 0
    EVEN_K: tl.constexpr = BUNDLE_K % BLOCK_N == 0
    TILES_N: tl.constexpr = (BUNDLE_K + BLOCK_N - 1) // BLOCK_N  # of a bundle
    if ALIGN_C < 16:
        C = C // ALIGN_C * ALIGN_C
    if ALIGN_K < 16:
        K = K // ALIGN_K * ALIGN_K
    # All bundles of the same positions run together: each reads its part of the same lines of memory.
    tiles_n = K // BUNDLE_K * TILES_N
    pid = tl.program_id(0)
    tile_m = pid // tiles_n
    bundle = pid % tiles_n // TILES_N
    column = pid % TILES_N * BLOCK_N + tl.arange(0, BLOCK_N)  # within the bundle: tiles_n is a multiple of TILES_N

    # Rows past the end read row M - 1 instead of being masked in every load; only their store is masked.
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_read = tl.minimum(m, M - 1)
    n = m_read // (P * Q)
    h0 = m_read // Q % P * stride_h - pad_h
    w0 = m_read % Q * stride_w - pad_w
    k = bundle * BUNDLE_K + column
    k_read = k if EVEN_K else bundle * BUNDLE_K + tl.minimum(column, BUNDLE_K - 1)
    w_rows = weight_ptr + k_read.to(tl.int64) * (TAPS * BUNDLE_C)
    # Before the first tap: may point outside the map, where it is masked.
    x_rows = x_ptr + ((n.to(tl.int64) * H + h0) * W + w0) * C + bundle * BUNDLE_C

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    steps: tl.constexpr = (BUNDLE_C + BLOCK_K - 1) // BLOCK_K * TAPS
    where = (x_rows, w_rows, h0, w0, 0, steps, H, W, C, BUNDLE_C, dilation_h, dilation_w)
    acc = _over_taps(acc, *where, S, TAPS, PADDED, EVEN_C, INPUT_PRECISION, ROUND_TF32, UPCAST, BLOCK_K)

    if BUNDLE > 1:
        # An off-diagonal zero times an infinity of another group is NaN. Where a NaN came out, the tile is computed
        # again, each output from its own group alone: slow, right, and run only where activations blew up.
        if tl.max((acc != acc).to(tl.int32)) > 0:
            C_GROUP: tl.constexpr = BUNDLE_C // BUNDLE
            own = column // (BUNDLE_K // BUNDLE) * C_GROUP
            acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            for step in tl.range(0, TAPS * C_GROUP):
                tap = step // C_GROUP
                c = own + step % C_GROUP
                dh = tap // S * dilation_h
                dw = tap % S * dilation_w
                ok = (column < BUNDLE_K)[None, :]
                if PADDED:
                    ok = ok & ((h0 + dh >= 0) & (h0 + dh < H) & (w0 + dw >= 0) & (w0 + dw < W))[:, None]
                a = tl.load(x_rows[:, None] + ((dh * W + dw) * C + c)[None, :], mask=ok, other=0.0)
                b = tl.load(w_rows + tap * BUNDLE_C + c, mask=column < BUNDLE_K, other=0.0)
                acc += a.to(tl.float32) * b.to(tl.float32)[None, :]

    # 64 bits for the tile's first row alone: an offset of 64 bits an element would fill the registers.
    first_row = (tile_m * BLOCK_M).to(tl.int64) * K
    out = tl.arange(0, BLOCK_M)[:, None] * K + k[None, :]
    out_ok = (m < M)[:, None]
    if not EVEN_K:
        out_ok = out_ok & (column < BUNDLE_K)[None, :]
    bias = tl.load(bias_ptr + k_read)[None, :]
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + first_row + out, mask=out_ok, other=0.0).to(tl.float32)
    tl.store(y_ptr + first_row + out, _finished(acc, bias, RELU).to(y_ptr.dtype.element_ty), mask=out_ok)
