"""What the backward of conv_bn_act needs around its two convolutions: ReLU mask, folded weight, weight gradients.

With g = grad * mask, inv = rsqrt(var + eps), scale = bn_weight * inv and G the weight gradient of the bare convolution:
dW = G * scale, dbn_bias = sum g, dbn_weight = inv * (sum over c, r, s of W * G - mean * sum g). So the raw convolution
output is neither stored nor recomputed.
"""

import triton
import triton.language as tl

from .bn_act import _masked


@triton.jit(do_not_specialize=["M", "steps"])
def _conv_bn_act_bwd_mask_kernel(
    grad_ptr,  # [M, K]
    y_ptr,  # [M, K] or None: no ReLU
    g_ptr,  # [M, K] or None: not wanted
    partial_ptr,  # [splits, K] float32, sum of g over a split's rows, or None
    M,
    K,
    steps,  # row blocks of one split
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALIGN: tl.constexpr,  # what divides K, up to 16: Triton finds out only whether 16 does
):
    if ALIGN < 16:
        K = K // ALIGN * ALIGN
    k = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    split = tl.program_id(1)
    total = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    for step in tl.range(0, steps):
        m = (split.to(tl.int64) * steps + step) * BLOCK_R + tl.arange(0, BLOCK_R)
        at = m[:, None] * K + k[None, :]
        ok = (m < M)[:, None] & (k < K)[None, :]
        g = _masked(grad_ptr, y_ptr, at, ok)
        if g_ptr is not None:
            tl.store(g_ptr + at, g, mask=ok)
        if partial_ptr is not None:
            total += g.to(tl.float32)
    if partial_ptr is not None:
        tl.store(partial_ptr + split.to(tl.int64) * K + k, tl.sum(total, axis=0), mask=k < K)


@triton.jit
def _conv_bn_act_bwd_fold_kernel(
    weight_ptr,  # [K, E], dense
    bn_weight_ptr,  # [K] or None
    running_var_ptr,  # [K]
    folded_ptr,  # [K, E], dense: weight * bn_weight * rsqrt(var + eps)
    eps,
    E,  # elements of one output channel's filter
    BLOCK: tl.constexpr,
):
    k = tl.program_id(0)
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    scale = tl.rsqrt(tl.load(running_var_ptr + k).to(tl.float32) + eps)
    if bn_weight_ptr is not None:
        scale *= tl.load(bn_weight_ptr + k).to(tl.float32)
    at = k.to(tl.int64) * E + e
    w = tl.load(weight_ptr + at, mask=e < E, other=0.0).to(tl.float32)
    tl.store(folded_ptr + at, (w * scale).to(folded_ptr.dtype.element_ty), mask=e < E)


@triton.jit
def _conv_bn_act_bwd_weight_kernel(
    raw_ptr,  # [K, C_group, R, S], any strides: the bare convolution's weight gradient
    weight_ptr,  # [K, C_group, R, S], any strides, or None: dbn_weight not wanted
    bn_weight_ptr,  # [K] or None
    running_mean_ptr,  # [K] or None: no BatchNorm
    running_var_ptr,  # [K] or None
    sum_g_ptr,  # [K] float32, or None
    dweight_ptr,  # [K, C_group, R, S], any strides, or None
    dbn_weight_ptr,  # [K] float32, or None
    eps,
    E,  # C_group * R * S
    D1,  # the middle and the innermost extent, in the order in which dweight lies
    D2,
    stride_raw_k,
    stride_raw_0,
    stride_raw_1,
    stride_raw_2,
    stride_weight_k,
    stride_weight_0,
    stride_weight_1,
    stride_weight_2,
    stride_dweight_k,
    stride_dweight_0,
    stride_dweight_1,
    stride_dweight_2,
    BLOCK: tl.constexpr,
):
    k = tl.program_id(0).to(tl.int64)
    inv = 1.0
    scale = 1.0
    if running_var_ptr is not None:
        inv = tl.rsqrt(tl.load(running_var_ptr + k).to(tl.float32) + eps)
        scale = inv
        if bn_weight_ptr is not None:
            scale *= tl.load(bn_weight_ptr + k).to(tl.float32)
    product = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in tl.range(0, E, BLOCK):
        e = start + tl.arange(0, BLOCK)
        i0 = e // (D1 * D2)
        i1 = e // D2 % D1
        i2 = e % D2
        at = k * stride_raw_k + i0 * stride_raw_0 + i1 * stride_raw_1 + i2 * stride_raw_2
        raw = tl.load(raw_ptr + at, mask=e < E, other=0.0).to(tl.float32)
        if dweight_ptr is not None:
            at = k * stride_dweight_k + i0 * stride_dweight_0 + i1 * stride_dweight_1 + i2 * stride_dweight_2
            tl.store(dweight_ptr + at, (raw * scale).to(dweight_ptr.dtype.element_ty), mask=e < E)
        if dbn_weight_ptr is not None:
            at = k * stride_weight_k + i0 * stride_weight_0 + i1 * stride_weight_1 + i2 * stride_weight_2
            product += raw * tl.load(weight_ptr + at, mask=e < E, other=0.0).to(tl.float32)
    if dbn_weight_ptr is not None:
        mean = tl.load(running_mean_ptr + k).to(tl.float32)
        tl.store(dbn_weight_ptr + k, inv * (tl.sum(product, axis=0) - mean * tl.load(sum_g_ptr + k)))
