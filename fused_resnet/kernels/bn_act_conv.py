"""Implicit-GEMM convolution with BatchNorm and ReLU on the way in, and the statistics of its result on the way out.

For training with batch statistics: a normalised tensor is never stored. What the convolution reads is the raw result of
the one before it; what it leaves, next to its own raw result, are the mean and variance that the next one normalises
with. The GEMM is that of `_conv_bn_act_fwd_kernel`.
"""

import triton
import triton.language as tl

from .conv_bn_act import _banded, _flat_product, _operand


@triton.jit
def _bn_affine_kernel(
    mean_ptr,  # [C]
    var_ptr,  # [C]
    bn_weight_ptr,  # [C] or None
    bn_bias_ptr,  # [C] or None
    affine_ptr,  # [3, stride] float32: mean, scale, bias; zero past C
    eps,
    C,
    stride,
    BLOCK: tl.constexpr,
):
    """What `_normalised` reads. Worked out here once: in the convolution, every thread would take square roots anew at
    every step."""
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = c < C
    scale = tl.rsqrt(tl.load(var_ptr + c, mask=ok, other=1.0).to(tl.float32) + eps)
    if bn_weight_ptr is not None:
        scale *= tl.load(bn_weight_ptr + c, mask=ok, other=0.0).to(tl.float32)
    bias = tl.zeros((BLOCK,), dtype=tl.float32)
    if bn_bias_ptr is not None:
        bias = tl.load(bn_bias_ptr + c, mask=ok, other=0.0).to(tl.float32)
    tl.store(affine_ptr + c, tl.load(mean_ptr + c, mask=ok, other=0.0).to(tl.float32))
    tl.store(affine_ptr + stride + c, tl.where(ok, scale, 0.0))
    tl.store(affine_ptr + 2 * stride + c, bias)


@triton.jit
def _affine(ptr, stride, c):
    """(mean, scale, bias) of channels c, from what `_bn_affine_kernel` wrote."""
    return tl.load(ptr + c), tl.load(ptr + stride + c), tl.load(ptr + 2 * stride + c)


@triton.jit
def _normalised(x, mean, scale, bias, RELU: tl.constexpr):
    """relu(bn(x)) of x: [rows, channels], in x's dtype, as a network that stores it would. A channel that is not there,
    of which x is zero, stays zero."""
    # Centre first: x * scale + (bias - mean * scale) cancels where mean >> std.
    a = (x.to(tl.float32) - mean[None, :]) * scale[None, :] + bias[None, :]
    if RELU:
        a = tl.maximum(a, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return a.to(x.dtype)


@triton.jit
def _bundle_weight_kernel(
    weight_ptr,  # [K, R * S, C], dense; C: channels of a group
    wide_ptr,  # [K, R * S, BUNDLE * C]
    K_GROUP: tl.constexpr,
    C: tl.constexpr,
    TAPS: tl.constexpr,
    BUNDLE: tl.constexpr,  # groups
    BLOCK: tl.constexpr,
):
    """The weight of a bundle of groups as one product: each output's own group, zeros elsewhere."""
    k = tl.program_id(0)
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    WIDE: tl.constexpr = BUNDLE * C
    there = e < TAPS * WIDE
    tap = e // WIDE
    c = e % WIDE
    own = there & (c // C == k // K_GROUP % BUNDLE)
    w = tl.load(weight_ptr + k.to(tl.int64) * (TAPS * C) + tap * C + c % C, mask=own, other=0.0)
    tl.store(wide_ptr + k.to(tl.int64) * (TAPS * WIDE) + e, w, mask=there)


@triton.jit(do_not_specialize=["M", "P", "Q", "H", "W"])
def _bn_act_conv_fwd_kernel(
    x_ptr,  # [N, C, H, W], any strides (a channel stride of 1 is what makes it fast)
    weight_ptr,  # [K, R, S, C], dense
    affine_ptr,  # [3, affine_stride] float32 of `_bn_affine_kernel`, or None: x is convolved as it is
    scale_ptr,  # [K] float32 or None: y is the plain convolution
    shift_ptr,  # [K] float32 or None, with scale
    residual_ptr,  # [M, K], dense, or None
    y_ptr,  # [M, K], dense
    tile_mean_ptr,  # [tiles_m, K] float32: the mean of a tile's rows of y as stored, or None
    tile_m2_ptr,  # [tiles_m, K] float32: sum of squared distances from that mean, or None
    M,  # N * P * Q
    P,
    Q,
    H,
    W,
    K,
    C,
    affine_stride,
    stride_xn,
    stride_xh,
    stride_xw,
    stride_xc,
    stride_h,
    stride_w,
    pad_h,
    pad_w,
    dilation_h,
    dilation_w,
    R: tl.constexpr,
    S: tl.constexpr,
    PADDED: tl.constexpr,  # a tap may fall outside the map
    ROWS: tl.constexpr,  # 1x1, stride 1, no padding, x rows evenly spaced: output row m reads input row m
    FLAT_C: tl.constexpr,  # 0, or C: the reduction index is (tap, channel) flattened, for a few input channels
    EVEN_C: tl.constexpr,  # BLOCK_K divides C
    EVEN_K: tl.constexpr,  # BLOCK_N divides K
    ALIGN_X: tl.constexpr,  # what divides x's strides and C, up to 16
    ALIGN_K: tl.constexpr,  # what divides K, up to 16
    RELU: tl.constexpr,  # of x, behind its BatchNorm
    OUT_RELU: tl.constexpr,  # of y
    INPUT_PRECISION: tl.constexpr,
    ROUND_TF32: tl.constexpr,  # round operands to TF32
    UPCAST: tl.constexpr,  # operands to fp32: the interpreter's tl.dot returns garbage for bf16
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    BUNDLE: tl.constexpr,  # groups that are one product
    BUNDLE_C: tl.constexpr,  # 0, or of a grouped convolution the channels of x and of y in such a bundle: weight is
    BUNDLE_K: tl.constexpr,  # [K, R, S, BUNDLE_C] of `_bundle_weight_kernel`
):
    TAPS: tl.constexpr = R * S
    # Triton finds out by itself only what 16 divides; 8 channels of 16 bits are 16 bytes already.
    if ALIGN_X < 16:
        C = C // ALIGN_X * ALIGN_X
        stride_xn = stride_xn // ALIGN_X * ALIGN_X
        stride_xh = stride_xh // ALIGN_X * ALIGN_X
        stride_xw = stride_xw // ALIGN_X * ALIGN_X
    if ALIGN_K < 16:
        K = K // ALIGN_K * ALIGN_K
    tiles_n = tl.cdiv(K, BLOCK_N)
    if BUNDLE_K > 0:
        OF_BUNDLE: tl.constexpr = (BUNDLE_K + BLOCK_N - 1) // BLOCK_N
        tiles_n = K // BUNDLE_K * OF_BUNDLE
    tile_m, tile_n = _banded(tl.program_id(0), tl.cdiv(M, BLOCK_M), tiles_n, GROUP_M)
    first_k = 0
    end_k = K
    if BUNDLE_K > 0:
        bundle = tile_n // OF_BUNDLE
        tile_n = tile_n % OF_BUNDLE
        x_ptr += (bundle * BUNDLE_C).to(tl.int64) * stride_xc
        if affine_ptr is not None:
            affine_ptr += bundle * BUNDLE_C
        first_k = bundle * BUNDLE_K
        end_k = first_k + BUNDLE_K
        C = BUNDLE_C

    # Rows past the end read row M - 1 instead of being masked in every load; they are neither stored nor counted.
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_read = tl.minimum(m, M - 1)
    if ROWS:
        x_rows = x_ptr + m_read.to(tl.int64) * stride_xw
        h0 = 0
        w0 = 0
    else:
        n = m_read // (P * Q)
        h0 = m_read // Q % P * stride_h - pad_h
        w0 = m_read % Q * stride_w - pad_w
        # Before the first tap: may point outside the map, where it is masked.
        x_rows = x_ptr + n.to(tl.int64) * stride_xn + h0.to(tl.int64) * stride_xh + w0.to(tl.int64) * stride_xw
    k = first_k + tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k_read = k if EVEN_K else tl.minimum(k, end_k - 1)
    w_rows = weight_ptr + k_read.to(tl.int64) * (TAPS * C)

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if FLAT_C > 0:
        where = (x_rows, w_rows, h0, w0, H, W, stride_xh, stride_xw, stride_xc, dilation_h, dilation_w)
        acc = _flat_product(acc, *where, S, TAPS, PADDED, FLAT_C, INPUT_PRECISION, ROUND_TF32, UPCAST, BLOCK_K)
    else:
        lane = tl.arange(0, BLOCK_K)
        # One loop over (channel block, tap), taps innermost: see `_conv_bn_act_fwd_kernel`.
        for step in tl.range(0, tl.cdiv(C, BLOCK_K) * TAPS):
            c = step // TAPS * BLOCK_K + lane
            tap = step % TAPS
            dh = tap // S * dilation_h
            dw = tap % S * dilation_w
            offset = dh.to(tl.int64) * stride_xh + dw.to(tl.int64) * stride_xw
            a_ptrs = x_rows[:, None] + (offset + c.to(tl.int64) * stride_xc)[None, :]
            b_ptrs = w_rows[None, :] + (tap * C + c)[:, None]
            if PADDED:
                inside = ((h0 + dh >= 0) & (h0 + dh < H) & (w0 + dw >= 0) & (w0 + dw < W))[:, None]
                a = tl.load(a_ptrs, mask=inside if EVEN_C else inside & (c < C)[None, :], other=0.0)
            elif EVEN_C:
                a = tl.load(a_ptrs)
            else:
                a = tl.load(a_ptrs, mask=(c < C)[None, :], other=0.0)
            b = tl.load(b_ptrs) if EVEN_C else tl.load(b_ptrs, mask=(c < C)[:, None], other=0.0)
            if affine_ptr is not None:
                mean, scale, bias = _affine(affine_ptr, affine_stride, c)
                a = _normalised(a, mean, scale, bias, RELU)
                if PADDED:
                    a = tl.where(inside, a, tl.zeros_like(a))  # padding is zero behind BatchNorm and ReLU
                if BUNDLE_K > 0 and not EVEN_C:
                    a = tl.where((c < C)[None, :], a, tl.zeros_like(a))  # the next bundle's mean may be NaN
            a = _operand(a, ROUND_TF32, UPCAST)
            b = _operand(b, ROUND_TF32, UPCAST)
            acc = tl.dot(a, b, acc, input_precision=INPUT_PRECISION)
        if BUNDLE > 1:
            # As in `_conv_bn_act_fwd_kernel`: where a NaN came out, it may be another group's.
            if tl.max((acc != acc).to(tl.int32)) > 0:
                C_GROUP: tl.constexpr = BUNDLE_C // BUNDLE
                k_ok = k < end_k
                own = (k_read - first_k) // (BUNDLE_K // BUNDLE) * C_GROUP
                acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
                for step in tl.range(0, TAPS * C_GROUP):
                    tap = step // C_GROUP
                    c = own + step % C_GROUP
                    dh = tap // S * dilation_h
                    dw = tap % S * dilation_w
                    offset = dh.to(tl.int64) * stride_xh + dw.to(tl.int64) * stride_xw
                    inside = k_ok[None, :]
                    if PADDED:
                        on_map = (h0 + dh >= 0) & (h0 + dh < H) & (w0 + dw >= 0) & (w0 + dw < W)
                        inside = inside & on_map[:, None]
                    a = tl.load(
                        x_rows[:, None] + (offset + c.to(tl.int64) * stride_xc)[None, :], mask=inside, other=0.0
                    )
                    if affine_ptr is not None:
                        mean, scale, bias = _affine(affine_ptr, affine_stride, c)
                        a = tl.where(inside, _normalised(a, mean, scale, bias, RELU), tl.zeros_like(a))
                    b = tl.load(w_rows + tap * BUNDLE_C + c, mask=k_ok, other=0.0)
                    acc += a.to(tl.float32) * b.to(tl.float32)[None, :]

    # 64 bits for the tile's first row alone: an offset of 64 bits an element would fill the registers.
    first_row = (tile_m * BLOCK_M).to(tl.int64) * K
    out = tl.arange(0, BLOCK_M)[:, None] * K + k[None, :]
    row_ok = (m < M)[:, None]
    out_ok = row_ok if EVEN_K else row_ok & (k < end_k)[None, :]
    if scale_ptr is not None:
        acc = acc * tl.load(scale_ptr + k_read)[None, :] + tl.load(shift_ptr + k_read)[None, :]
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + first_row + out, mask=out_ok, other=0.0).to(tl.float32)
    if OUT_RELU:
        acc = tl.maximum(acc, 0.0, propagate_nan=tl.PropagateNan.ALL)
    y = acc.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + first_row + out, y, mask=out_ok)
    if tile_mean_ptr is not None:
        # Two passes over registers: a sum of squares would cancel where mean >> std.
        y = y.to(tl.float32)
        mean = tl.sum(tl.where(row_ok, y, 0.0), axis=0) / tl.minimum(M - tile_m * BLOCK_M, BLOCK_M).to(tl.float32)
        away = tl.where(row_ok, y - mean[None, :], 0.0)
        at = tile_m.to(tl.int64) * K + k
        tl.store(tile_mean_ptr + at, mean, mask=k < end_k)
        tl.store(tile_m2_ptr + at, tl.sum(away * away, axis=0), mask=k < end_k)
