"""The chained bottleneck: 3x3 -> ReLU -> 1x1 expand -> shortcut -> ReLU (-> the next block's 1x1 reduce -> ReLU).

A program owns BLOCK_M output positions and every channel of them. The 3x3's tile stays on the chip as the left operand
of the expand, which walks column blocks; each column block, finished, is at once multiplied by the next reduce. All
that follows the 3x3 is pointwise: there is no halo to recompute. BatchNorm is in the weights and biases already.
"""

import triton
import triton.language as tl


@triton.jit
def _operand(v, UPCAST: tl.constexpr):
    """v as the dot shall see it: the interpreter's returns garbage for bf16."""
    return v.to(tl.float32) if UPCAST else v


@triton.jit
def _relu(v):
    return tl.maximum(v, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit(do_not_specialize=["M", "P", "Q", "H", "W", "H2", "W2"])
def _chain_fwd_kernel(
    x_ptr,  # [N, H, W, C]; every tensor is dense, channels last
    weight1_ptr,  # [MID, 3, 3, C]
    bias1_ptr,  # [MID], like every bias float32
    weight2_ptr,  # [K, MID]
    bias2_ptr,  # [K]
    residual_ptr,  # [N, P, Q, K], or None
    x2_ptr,  # [N, H2, W2, C2], the projection's input, or None
    projection_ptr,  # [K, C2], or None
    weight3_ptr,  # [NEXT, K], or None
    bias3_ptr,  # [NEXT], or None
    y_ptr,  # [N, P, Q, K], with QUARTER [N, ceil(P / 2), ceil(Q / 2), K]; None where the pool is wanted
    z_ptr,  # [N, P, Q, NEXT], or None
    pool_ptr,  # [N, tiles of an image, K] float32 sums or, with POOL_MEAN, [N, K] means; or None
    M,  # N * P * Q
    P,
    Q,
    H,
    W,
    H2,
    W2,
    C: tl.constexpr,
    MID: tl.constexpr,
    K: tl.constexpr,
    C2: tl.constexpr,
    NEXT: tl.constexpr,
    STRIDE: tl.constexpr,
    STRIDE2: tl.constexpr,
    RELU: tl.constexpr,
    QUARTER: tl.constexpr,  # only the even rows and columns of y are stored
    POOL_MEAN: tl.constexpr,  # an image is one tile: its sum is the whole
    UPCAST: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # columns of the expand
    BLOCK_K: tl.constexpr,  # channels of the 3x3 and of the projection
    BLOCK_MID: tl.constexpr,  # all of MID
    BLOCK_NEXT: tl.constexpr,  # all of NEXT
    STAGES_CONV: tl.constexpr,
    STAGES_EXPAND: tl.constexpr,
):
    # With the pool, tiles do not reach over the end of an image: a tile's sum is then one image's.
    tile = tl.program_id(0)
    if pool_ptr is not None:
        tiles_of_image = tl.cdiv(P * Q, BLOCK_M)
        image = tile // tiles_of_image
        first = image * (P * Q) + tile % tiles_of_image * BLOCK_M
        end = (image + 1) * (P * Q)
    else:
        first = tile * BLOCK_M
        end = M
    row = tl.arange(0, BLOCK_M)
    row_ok = row < end - first
    # Rows past the end read the last row instead of being masked in every load; only their store is masked.
    m = tl.minimum(first + row, end - 1)
    n = m // (P * Q)
    p = m // Q % P
    q = m % Q

    # 64 bits for a tile's first position alone: the rest of the tile lies within 32 bits of it.
    first_n = first // (P * Q)
    first_p = first // Q % P
    first_q = first % Q
    first_x = (first_n * H + first_p * STRIDE) * W + first_q * STRIDE
    x_tile = x_ptr + first_x.to(tl.int64) * C
    h0 = p * STRIDE - 1
    w0 = q * STRIDE - 1
    x_rows = ((n * H + h0) * W + w0 - first_x) * C  # [BLOCK_M], before the first tap: where outside, it is masked

    mid = tl.arange(0, BLOCK_MID)
    lane = tl.arange(0, BLOCK_K)
    mid_read = mid if BLOCK_MID == MID else tl.minimum(mid, MID - 1)
    # Biased from the start: at the end, a whole row of biases would want registers beside a row of sums.
    acc1 = tl.zeros((BLOCK_M, BLOCK_MID), dtype=tl.float32) + tl.load(bias1_ptr + mid_read)[None, :]
    # One loop over (channel block, tap): nested loops would drain the pipeline at every tap.
    for step in tl.range(0, tl.cdiv(C, BLOCK_K) * 9, num_stages=STAGES_CONV):
        c = step // 9 * BLOCK_K + lane
        tap = step % 9
        dh = tap // 3
        dw = tap % 3
        h = h0 + dh
        w = w0 + dw
        x_ok = ((h >= 0) & (h < H) & (w >= 0) & (w < W))[:, None]
        a_ptrs = x_tile + (x_rows[:, None] + ((dh * W + dw) * C + c)[None, :])
        b_ptrs = weight1_ptr + (mid_read[None, :] * (9 * C) + (tap * C + c)[:, None])
        if C % BLOCK_K == 0:
            a = tl.load(a_ptrs, mask=x_ok, other=0.0)
            b = tl.load(b_ptrs)
        else:
            a = tl.load(a_ptrs, mask=x_ok & (c < C)[None, :], other=0.0)
            b = tl.load(b_ptrs, mask=(c < C)[:, None], other=0.0)
        acc1 = tl.dot(_operand(a, UPCAST), _operand(b, UPCAST), acc1, input_precision=INPUT_PRECISION)
    acc1 = _relu(acc1)
    if BLOCK_MID != MID:
        acc1 = tl.where((mid < MID)[None, :], acc1, 0.0)  # zero weights alone would turn an infinity into NaN
    left = _operand(acc1.to(x_ptr.dtype.element_ty), UPCAST)

    rows_k = tl.minimum(row, end - 1 - first) * K  # [BLOCK_M], from the tile's first row
    tile_k = first.to(tl.int64) * K
    if x2_ptr is not None:
        first_x2 = (first_n * H2 + first_p * STRIDE2) * W2 + first_q * STRIDE2
        x2_tile = x2_ptr + first_x2.to(tl.int64) * C2
        x2_rows = ((n * H2 + p * STRIDE2) * W2 + q * STRIDE2 - first_x2) * C2
        if C2 <= BLOCK_K:
            x2_whole = tl.load(x2_tile + (x2_rows[:, None] + lane[None, :]), mask=(lane < C2)[None, :], other=0.0)
            x2_whole = _operand(x2_whole, UPCAST)
    if y_ptr is not None:
        y_tile = y_ptr + tile_k
        y_rows = row * K
        y_ok = row_ok
        if QUARTER:
            half_p = (P + 1) // 2
            half_q = (Q + 1) // 2
            first_y = (first_n * half_p + first_p // 2) * half_q
            y_tile = y_ptr + first_y.to(tl.int64) * K
            y_rows = ((n * half_p + p // 2) * half_q + q // 2 - first_y) * K
            y_ok = row_ok & (p % 2 == 0) & (q % 2 == 0)
    if z_ptr is not None:
        following = tl.arange(0, BLOCK_NEXT)
        following_read = following if BLOCK_NEXT == NEXT else tl.minimum(following, NEXT - 1)
        acc3 = tl.zeros((BLOCK_M, BLOCK_NEXT), dtype=tl.float32)

    for column in tl.range(0, K, BLOCK_N, num_stages=STAGES_EXPAND):
        k = column + tl.arange(0, BLOCK_N)
        k_ok = k < K
        k_read = k if K % BLOCK_N == 0 else tl.minimum(k, K - 1)
        if residual_ptr is not None:
            shortcut = tl.load(residual_ptr + tile_k + (rows_k[:, None] + k_read[None, :]))
        expand = tl.load(weight2_ptr + (k_read[None, :] * MID + mid_read[:, None]))
        acc2 = tl.dot(left, _operand(expand, UPCAST), input_precision=INPUT_PRECISION)
        if x2_ptr is not None:
            if C2 <= BLOCK_K:
                project_ptrs = projection_ptr + (k_read[None, :] * C2 + lane[:, None])
                project = tl.load(project_ptrs, mask=(lane < C2)[:, None], other=0.0)
                acc2 = tl.dot(x2_whole, _operand(project, UPCAST), acc2, input_precision=INPUT_PRECISION)
            else:
                for start in tl.range(0, C2, BLOCK_K, num_stages=STAGES_CONV):
                    c = start + lane
                    a_ptrs = x2_tile + (x2_rows[:, None] + c[None, :])
                    b_ptrs = projection_ptr + (k_read[None, :] * C2 + c[:, None])
                    if C2 % BLOCK_K == 0:
                        a = tl.load(a_ptrs)
                        b = tl.load(b_ptrs)
                    else:
                        a = tl.load(a_ptrs, mask=(c < C2)[None, :], other=0.0)
                        b = tl.load(b_ptrs, mask=(c < C2)[:, None], other=0.0)
                    acc2 = tl.dot(_operand(a, UPCAST), _operand(b, UPCAST), acc2, input_precision=INPUT_PRECISION)
        acc2 += tl.load(bias2_ptr + k_read)[None, :]
        if residual_ptr is not None:
            acc2 += shortcut.to(tl.float32)
        if RELU:
            acc2 = _relu(acc2)
        if pool_ptr is not None:
            total = tl.sum(tl.where(row_ok[:, None], acc2, 0.0), 0)
            if POOL_MEAN:
                total = total / (P * Q)
            tl.store(pool_ptr + tile.to(tl.int64) * K + k, total.to(pool_ptr.dtype.element_ty), mask=k_ok)
        y = acc2.to(x_ptr.dtype.element_ty)
        if y_ptr is not None:
            ok = y_ok[:, None] if K % BLOCK_N == 0 else y_ok[:, None] & k_ok[None, :]
            tl.store(y_tile + (y_rows[:, None] + k[None, :]), y, mask=ok)
        if z_ptr is not None:
            reduce_ptrs = weight3_ptr + (following_read[None, :] * K + k_read[:, None])
            if K % BLOCK_N == 0:
                reduce = tl.load(reduce_ptrs)
            else:
                y = tl.where(k_ok[None, :], y, 0.0)
                reduce = tl.load(reduce_ptrs, mask=k_ok[:, None], other=0.0)
            acc3 = tl.dot(_operand(y, UPCAST), _operand(reduce, UPCAST), acc3, input_precision=INPUT_PRECISION)

    if z_ptr is not None:
        acc3 = _relu(acc3 + tl.load(bias3_ptr + following_read)[None, :])
        ok = row_ok[:, None] if BLOCK_NEXT == NEXT else row_ok[:, None] & (following < NEXT)[None, :]
        z_tile = z_ptr + first.to(tl.int64) * NEXT
        tl.store(z_tile + (row[:, None] * NEXT + following[None, :]), acc3.to(z_ptr.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["partials", "positions"])
def _chain_pool_kernel(
    partial_ptr,  # [N, partials, K] float32
    pooled_ptr,  # [N, K]
    partials,
    positions,  # of an image: what the sum is divided by
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The mean over an image: its partial sums added from the first to the last."""
    image = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for i in range(partials):
        total += tl.load(partial_ptr + (image * partials + i) * K + k, mask=k < K, other=0.0)
    tl.store(pooled_ptr + image * K + k, (total / positions).to(pooled_ptr.dtype.element_ty), mask=k < K)
