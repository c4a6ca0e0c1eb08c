"""Implicit-GEMM convolution with BatchNorm, residual and ReLU in its epilogue.

The GEMM: M = N*P*Q output positions, N = output channels, reduction = filter taps x input channels. The left operand is
gathered from x on the fly (nothing is unfolded in memory); the right operand is the weight as it lies in channels_last,
[K, R, S, C/groups], which is already K-major.
"""

import triton
import triton.language as tl


@triton.jit
def _operand(v, ROUND_TF32: tl.constexpr, UPCAST: tl.constexpr):
    """v as the tensor core shall see it. Of a float32 it takes the upper 19 bits and drops the rest: after a ReLU that
    would make every product too small, and a deep network's errors would add up."""
    if UPCAST:
        v = v.to(tl.float32)
    if ROUND_TF32:
        v = tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,r", [v], dtype=tl.float32, is_pure=True, pack=1)
    return v


@triton.jit
def _banded(pid, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """(tile_m, tile_n) of a program. Programs that run together share GROUP_M row blocks and walk the column blocks: x
    rows and weights stay in L2."""
    band = pid // (GROUP_M * tiles_n)
    band_rows = tl.minimum(tiles_m - band * GROUP_M, GROUP_M)
    in_band = pid % (GROUP_M * tiles_n)
    return band * GROUP_M + in_band % band_rows, in_band // band_rows


@triton.jit
def _flat_product(
    acc,  # [BLOCK_M, BLOCK_N] float32
    x_rows,  # [BLOCK_M] pointers, before the first tap
    w_rows,  # [BLOCK_N] pointers
    h0,  # [BLOCK_M], read with PADDED
    w0,
    H,
    W,
    stride_xh,
    stride_xw,
    stride_xc,
    dilation_h,
    dilation_w,
    S: tl.constexpr,
    TAPS: tl.constexpr,
    PADDED: tl.constexpr,
    FLAT_C: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    ROUND_TF32: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """acc plus the convolution of a few input channels: the reduction index is (tap, channel) flattened."""
    lane = tl.arange(0, BLOCK_K)
    for step in tl.range(0, tl.cdiv(TAPS * FLAT_C, BLOCK_K)):
        i = step * BLOCK_K + lane
        tap = i // FLAT_C
        dh = tap // S * dilation_h
        dw = tap % S * dilation_w
        offset = dh.to(tl.int64) * stride_xh + dw.to(tl.int64) * stride_xw + (i % FLAT_C).to(tl.int64) * stride_xc
        ok = i < TAPS * FLAT_C
        x_ok = ok[None, :]
        if PADDED:
            h = h0[:, None] + dh[None, :]
            w = w0[:, None] + dw[None, :]
            x_ok = x_ok & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        a = tl.load(x_rows[:, None] + offset[None, :], mask=x_ok, other=0.0)
        b = tl.load(w_rows[None, :] + i[:, None], mask=ok[:, None], other=0.0)
        a = _operand(a, ROUND_TF32, UPCAST)
        b = _operand(b, ROUND_TF32, UPCAST)
        acc = tl.dot(a, b, acc, input_precision=INPUT_PRECISION)
    return acc


@triton.jit(do_not_specialize=["M", "P", "Q", "H", "W"])
def _conv_bn_act_fwd_kernel(
    x_ptr,  # [N, C, H, W], any strides (a channel stride of 1 is what makes it fast)
    weight_ptr,  # [K, R, S, C_group], dense
    bn_weight_ptr,  # [K] or None
    bn_bias_ptr,  # [K] or None
    running_mean_ptr,  # [K] or None: no BatchNorm at all
    running_var_ptr,  # [K] or None
    residual_ptr,  # [M, K], dense, or None
    y_ptr,  # [M, K], dense
    eps,
    M,  # N * P * Q
    P,
    Q,
    H,
    W,
    K,
    C_group,  # input channels of one group
    K_group,  # output channels of one group
    groups,
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
    FLAT_C: tl.constexpr,  # 0, or C_group: the reduction index is (tap, channel) flattened, for a few input channels
    GROUPS_PER_TILE: tl.constexpr,  # > 1: a tile spans whole groups, its right operand is block-diagonal
    EVEN_C: tl.constexpr,  # channel blocks never reach past the last channel of a tile's groups
    EVEN_K: tl.constexpr,  # the same for output channels
    ALIGN_X: tl.constexpr,  # what divides x's strides and C_group, up to 16
    ALIGN_K: tl.constexpr,  # what divides K_group, up to 16
    RELU: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    ROUND_TF32: tl.constexpr,  # round operands to TF32
    UPCAST: tl.constexpr,  # operands to fp32: the interpreter's tl.dot returns garbage for bf16
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    TAPS: tl.constexpr = R * S
    # Triton finds out by itself only what 16 divides; 8 channels of 16 bits are 16 bytes already.
    if ALIGN_X < 16:
        C_group = C_group // ALIGN_X * ALIGN_X
        stride_xn = stride_xn // ALIGN_X * ALIGN_X
        stride_xh = stride_xh // ALIGN_X * ALIGN_X
        stride_xw = stride_xw // ALIGN_X * ALIGN_X
    if ALIGN_K < 16:
        K = K // ALIGN_K * ALIGN_K
        K_group = K_group // ALIGN_K * ALIGN_K

    tiles_per_group = tl.cdiv(K_group * GROUPS_PER_TILE, BLOCK_N)
    tiles_n = tl.cdiv(groups, GROUPS_PER_TILE) * tiles_per_group
    tile_m, tile_n = _banded(tl.program_id(0), tl.cdiv(M, BLOCK_M), tiles_n, GROUP_M)
    first_group = tile_n // tiles_per_group * GROUPS_PER_TILE

    # Rows past the end read row M - 1 instead of being masked in every load; only their store is masked.
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_read = tl.minimum(m, M - 1)
    if ROWS:
        x_rows = x_ptr + m_read.to(tl.int64) * stride_xw
        h0 = 0
        w0 = 0
    else:
        n = m_read // (P * Q)
        p = m_read // Q % P
        q = m_read % Q
        h0 = p * stride_h - pad_h
        w0 = q * stride_w - pad_w
        x_rows = (
            x_ptr + n.to(tl.int64) * stride_xn + h0.to(tl.int64) * stride_xh + w0.to(tl.int64) * stride_xw
        )  # [BLOCK_M], before the first tap: may point outside the map, where it is masked

    # Output channels of this tile, counted from its first group.
    k_in = tile_n % tiles_per_group * BLOCK_N + tl.arange(0, BLOCK_N)
    k = first_group * K_group + k_in
    k_ok = (k_in < GROUPS_PER_TILE * K_group) & (k < K)
    k_read = k if EVEN_K else tl.where(k_ok, k, first_group * K_group)
    w_rows = weight_ptr + k_read.to(tl.int64) * (TAPS * C_group)
    x_rows += first_group.to(tl.int64) * C_group * stride_xc

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    lane = tl.arange(0, BLOCK_K)
    if FLAT_C > 0:
        where = (x_rows, w_rows, h0, w0, H, W, stride_xh, stride_xw, stride_xc, dilation_h, dilation_w)
        acc = _flat_product(acc, *where, S, TAPS, PADDED, FLAT_C, INPUT_PRECISION, ROUND_TF32, UPCAST, BLOCK_K)
    else:
        # One loop over (channel block, tap): nested loops would drain the pipeline at every tap. Taps are innermost:
        # the R*S shifted reads of one channel block overlap, and dividing by the constant TAPS is cheap.
        channels = tl.minimum(GROUPS_PER_TILE, groups - first_group) * C_group
        if GROUPS_PER_TILE > 1:
            w_start = k_in // K_group * C_group  # first input channel of each output channel's group
        for step in tl.range(0, tl.cdiv(channels, BLOCK_K) * TAPS):
            c = step // TAPS * BLOCK_K + lane
            tap = step % TAPS
            dh = tap // S * dilation_h
            dw = tap % S * dilation_w
            offset = dh.to(tl.int64) * stride_xh + dw.to(tl.int64) * stride_xw
            a_ptrs = x_rows[:, None] + (offset + c.to(tl.int64) * stride_xc)[None, :]
            if PADDED:
                h = h0 + dh
                w = w0 + dw
                x_ok = ((h >= 0) & (h < H) & (w >= 0) & (w < W))[:, None]
                if not EVEN_C:
                    x_ok = x_ok & (c < channels)[None, :]
                a = tl.load(a_ptrs, mask=x_ok, other=0.0)
            elif not EVEN_C:
                a = tl.load(a_ptrs, mask=(c < channels)[None, :], other=0.0)
            else:
                a = tl.load(a_ptrs)
            if GROUPS_PER_TILE > 1:
                c_group = c[:, None] - w_start[None, :]
                b = tl.load(
                    w_rows[None, :] + (tap * C_group + c_group),
                    mask=(c_group >= 0) & (c_group < C_group) & k_ok[None, :],
                    other=0.0,
                )
            elif EVEN_C:
                b = tl.load(w_rows[None, :] + (tap * C_group + c)[:, None])
            else:
                b = tl.load(w_rows[None, :] + (tap * C_group + c)[:, None], mask=(c < channels)[:, None], other=0.0)
            a = _operand(a, ROUND_TF32, UPCAST)
            b = _operand(b, ROUND_TF32, UPCAST)
            acc = tl.dot(a, b, acc, input_precision=INPUT_PRECISION)

        if GROUPS_PER_TILE > 1:
            # An off-diagonal zero times an infinity of another group is NaN. Where a NaN came out, the tile is computed
            # again, each output channel from its own group alone: slow, right, and run only where activations blew up.
            if tl.max((acc != acc).to(tl.int32)) > 0:
                acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
                for step in tl.range(0, TAPS * C_group):
                    tap = step // C_group
                    c = step % C_group
                    dh = tap // S * dilation_h
                    dw = tap % S * dilation_w
                    offset = dh.to(tl.int64) * stride_xh + dw.to(tl.int64) * stride_xw
                    x_ok = k_ok[None, :]
                    if PADDED:
                        h = h0 + dh
                        w = w0 + dw
                        x_ok = x_ok & ((h >= 0) & (h < H) & (w >= 0) & (w < W))[:, None]
                    a_ptrs = x_rows[:, None] + (offset + (w_start + c).to(tl.int64) * stride_xc)[None, :]
                    a = tl.load(a_ptrs, mask=x_ok, other=0.0).to(tl.float32)
                    acc += a * tl.load(w_rows + step, mask=k_ok, other=0.0).to(tl.float32)[None, :]

    if running_mean_ptr is not None:
        mean = tl.load(running_mean_ptr + k_read).to(tl.float32)
        scale = tl.rsqrt(tl.load(running_var_ptr + k_read).to(tl.float32) + eps)
        if bn_weight_ptr is not None:
            scale *= tl.load(bn_weight_ptr + k_read).to(tl.float32)
        shift = -mean * scale
        if bn_bias_ptr is not None:
            shift += tl.load(bn_bias_ptr + k_read).to(tl.float32)
        acc = acc * scale[None, :] + shift[None, :]

    # 64 bits for the tile's first row alone: an offset of 64 bits an element would fill the registers.
    first_row = (tile_m * BLOCK_M).to(tl.int64) * K
    out = tl.arange(0, BLOCK_M)[:, None] * K + k[None, :]
    out_ok = (m < M)[:, None]
    if not EVEN_K:
        out_ok = out_ok & k_ok[None, :]
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + first_row + out, mask=out_ok, other=0.0).to(tl.float32)
    if RELU:
        acc = tl.maximum(acc, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(y_ptr + first_row + out, acc.to(y_ptr.dtype.element_ty), mask=out_ok)
