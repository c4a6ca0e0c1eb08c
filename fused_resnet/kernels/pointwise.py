"""What stands between the large products of a pointwise convolution and its batch norm: vectors [K], matrices [K, C]
and [C, C] (backends/composed.py has the arithmetic). One launch each, where PyTorch's operators take a dozen.

Weights are 16 bits, which TF32 holds; what they are multiplied with is cut into two parts that TF32 holds, so that the
products are as good as float32's, on the tensor cores.
"""

import triton
import triton.language as tl

from .bn_act import _inverse_and_scale
from .conv_bn_act import _banded, _operand


@triton.jit
def _product(a, b, acc):
    """acc + a b: [.., J] of 16-bit values times [J, ..] of float32 ones."""
    upper = (b.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    acc = tl.dot(a, upper, acc, input_precision="tf32")
    return tl.dot(a, b - upper, acc, input_precision="tf32")


@triton.jit
def _product_statistics_kernel(
    weight_ptr,  # [K, C] of 16 bits
    a_mean_ptr,  # [C] float32
    a_cov_ptr,  # [C, C] float32
    out_weight_ptr,  # [K] or None
    out_bias_ptr,  # [K] or None
    mean_ptr,  # [K] float32, of the product's channels
    var_ptr,  # [K] float32, biased
    scale_ptr,  # [K] float32
    shift_ptr,  # [K] float32
    eps,
    K,
    C,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    ok = k < K
    mean = tl.zeros((BLOCK_K,), dtype=tl.float32)
    var = tl.zeros((BLOCK_K,), dtype=tl.float32)
    for start in tl.range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        w = tl.load(weight_ptr + k[:, None] * C + c[None, :], mask=ok[:, None] & (c < C)[None, :], other=0.0)
        w = w.to(tl.float32)
        mean += tl.sum(w * tl.load(a_mean_ptr + c, mask=c < C, other=0.0)[None, :], axis=1)
        product = tl.zeros((BLOCK_K, BLOCK_C), dtype=tl.float32)
        for inner in tl.range(0, C, BLOCK_J):
            j = inner + tl.arange(0, BLOCK_J)
            rows = tl.load(weight_ptr + k[:, None] * C + j[None, :], mask=ok[:, None] & (j < C)[None, :], other=0.0)
            cov = tl.load(a_cov_ptr + j[:, None] * C + c[None, :], mask=(j < C)[:, None] & (c < C)[None, :], other=0.0)
            product = _product(rows.to(tl.float32), cov, product)
        var += tl.sum(product * w, axis=1)
    var = tl.maximum(var, 0.0, propagate_nan=tl.PropagateNan.ALL)
    _, scale = _inverse_and_scale(out_weight_ptr, var, k, ok, eps)
    shift = -mean * scale
    if out_bias_ptr is not None:
        shift += tl.load(out_bias_ptr + k, mask=ok, other=0.0).to(tl.float32)
    tl.store(mean_ptr + k, mean, mask=ok)
    tl.store(var_ptr + k, var, mask=ok)
    tl.store(scale_ptr + k, scale, mask=ok)
    tl.store(shift_ptr + k, shift, mask=ok)


@triton.jit
def _pointwise_bwd_rows_kernel(
    product_ptr,  # [K, C] float32: g^T a
    sum_g_ptr,  # [K] float32
    a_mean_ptr,  # [C] float32
    weight_ptr,  # [K, C] of 16 bits
    out_weight_ptr,  # [K] or None
    var_ptr,  # [K] float32
    slope_ptr,  # [K] float32: scale * inv^2 * m / M
    dout_weight_ptr,  # [K] float32
    folded_ptr,  # [K, C] of 16 bits: scale * weight, or None
    eps,
    count,
    K,
    C,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    ok = k < K
    var = tl.load(var_ptr + k, mask=ok, other=1.0)
    inv, scale = _inverse_and_scale(out_weight_ptr, var, k, ok, eps)
    sum_g = tl.load(sum_g_ptr + k, mask=ok, other=0.0)
    moment = tl.zeros((BLOCK_K,), dtype=tl.float32)
    for start in tl.range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        at = k[:, None] * C + c[None, :]
        inside = ok[:, None] & (c < C)[None, :]
        w = tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(a_mean_ptr + c, mask=c < C, other=0.0)
        centred = tl.load(product_ptr + at, mask=inside, other=0.0) - sum_g[:, None] * mean[None, :]
        moment += tl.sum(centred * w, axis=1)
        if folded_ptr is not None:
            tl.store(folded_ptr + at, (scale[:, None] * w).to(folded_ptr.dtype.element_ty), mask=inside)
    tl.store(slope_ptr + k, scale * inv * inv * moment / count, mask=ok)
    tl.store(dout_weight_ptr + k, inv * moment, mask=ok)


@triton.jit
def _pointwise_bwd_weight_kernel(
    product_ptr,  # [K, C] float32: g^T a
    sum_g_ptr,  # [K] float32
    a_mean_ptr,  # [C] float32
    a_cov_ptr,  # [C, C] float32
    weight_ptr,  # [K, C] of 16 bits
    out_weight_ptr,  # [K] or None
    var_ptr,  # [K] float32
    slope_ptr,  # [K] float32
    dweight_ptr,  # [K, C]
    eps,
    count,
    K,
    C,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dweight = scale (product - sum_g a_mean) - M slope (weight a_cov)."""
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    ok = k < K
    turned = tl.zeros((BLOCK_K, BLOCK_C), dtype=tl.float32)
    for start in tl.range(0, C, BLOCK_C):
        j = start + tl.arange(0, BLOCK_C)
        rows = tl.load(weight_ptr + k[:, None] * C + j[None, :], mask=ok[:, None] & (j < C)[None, :], other=0.0)
        cov = tl.load(a_cov_ptr + j[:, None] * C + c[None, :], mask=(j < C)[:, None] & (c < C)[None, :], other=0.0)
        turned = _product(rows.to(tl.float32), cov, turned)
    at = k[:, None] * C + c[None, :]
    inside = ok[:, None] & (c < C)[None, :]
    _, scale = _inverse_and_scale(out_weight_ptr, tl.load(var_ptr + k, mask=ok, other=1.0), k, ok, eps)
    sum_g = tl.load(sum_g_ptr + k, mask=ok, other=0.0)
    slope = tl.load(slope_ptr + k, mask=ok, other=0.0)
    mean = tl.load(a_mean_ptr + c, mask=c < C, other=0.0)
    centred = tl.load(product_ptr + at, mask=inside, other=0.0) - sum_g[:, None] * mean[None, :]
    dweight = scale[:, None] * centred - (count * slope)[:, None] * turned
    tl.store(dweight_ptr + at, dweight.to(dweight_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _pointwise_bwd_turn_kernel(
    weight_ptr,  # [K, C] of 16 bits
    slope_ptr,  # [K] float32
    turn_ptr,  # [C, C] of 16 bits: -weight^T slope weight
    K,
    C,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    i = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    turn = tl.zeros((BLOCK_C, BLOCK_C), dtype=tl.float32)
    for start in tl.range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        ok = k < K
        slope = tl.load(slope_ptr + k, mask=ok, other=0.0)
        left = tl.load(weight_ptr + k[None, :] * C + i[:, None], mask=ok[None, :] & (i < C)[:, None], other=0.0)
        right = tl.load(weight_ptr + k[:, None] * C + c[None, :], mask=ok[:, None] & (c < C)[None, :], other=0.0)
        turn = _product(left.to(tl.float32), right.to(tl.float32) * slope[:, None], turn)
    inside = (i < C)[:, None] & (c < C)[None, :]
    tl.store(turn_ptr + i[:, None] * C + c[None, :], (-turn).to(turn_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _pointwise_bwd_shift_kernel(
    turn_ptr,  # [C, C], as it is stored
    folded_ptr,  # [K, C], as it is stored
    a_mean_ptr,  # [C] float32
    sum_g_ptr,  # [K] float32
    shift_ptr,  # [C] float32: -turn^T a_mean - folded^T sum_g / M, so that a mean that cancels does
    count,
    K,
    C,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    shift = tl.zeros((BLOCK_K, BLOCK_C), dtype=tl.float32)
    for start in tl.range(0, C, BLOCK_K):
        j = start + tl.arange(0, BLOCK_K)
        inside = (j < C)[:, None] & (c < C)[None, :]
        turn = tl.load(turn_ptr + j[:, None] * C + c[None, :], mask=inside, other=0.0).to(tl.float32)
        shift += turn * tl.load(a_mean_ptr + j, mask=j < C, other=0.0)[:, None]
    folds = tl.zeros((BLOCK_K, BLOCK_C), dtype=tl.float32)
    for start in tl.range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = (k < K)[:, None] & (c < C)[None, :]
        folded = tl.load(folded_ptr + k[:, None] * C + c[None, :], mask=inside, other=0.0).to(tl.float32)
        folds += folded * tl.load(sum_g_ptr + k, mask=k < K, other=0.0)[:, None]
    tl.store(shift_ptr + c, -tl.sum(shift, axis=0) - tl.sum(folds, axis=0) / count, mask=c < C)


@triton.jit(do_not_specialize=["M"])
def _pointwise_bwd_input_kernel(
    g_ptr,  # [M, K]
    folded_ptr,  # [K, C]
    a_ptr,  # [M, C]
    turn_ptr,  # [C, C]
    shift_ptr,  # [C] float32
    da_ptr,  # [M, C]: g folded + a turn + shift
    M,
    K,
    C,
    EVEN_K: tl.constexpr,  # BLOCK_K divides K
    EVEN_C: tl.constexpr,  # BLOCK_N and BLOCK_K divide C
    ALIGN: tl.constexpr,  # what divides K and C, up to 16: Triton finds out only whether 16 does
    UPCAST: tl.constexpr,  # operands to fp32: the interpreter's tl.dot returns garbage for bf16
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Both products in one sum, rounded once. The second's terms are as small as 1 / sqrt(M): added to a first that is
    rounded to 16 bits already they would be lost, in every row alike."""
    if ALIGN < 16:
        K = K // ALIGN * ALIGN
        C = C // ALIGN * ALIGN
    tile_m, tile_n = _banded(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(C, BLOCK_N), GROUP_M)
    m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.minimum(m, M - 1)[:, None]
    c = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in tl.range(0, K, BLOCK_K):
        k = start + lane
        if EVEN_K and EVEN_C:
            g = tl.load(g_ptr + rows * K + k[None, :])
            folded = tl.load(folded_ptr + k[:, None] * C + c[None, :])
        else:
            g = tl.load(g_ptr + rows * K + k[None, :], mask=(k < K)[None, :], other=0.0)
            inside = (k < K)[:, None] & (c < C)[None, :]
            folded = tl.load(folded_ptr + k[:, None] * C + c[None, :], mask=inside, other=0.0)
        acc = tl.dot(_operand(g, False, UPCAST), _operand(folded, False, UPCAST), acc)
    for start in tl.range(0, C, BLOCK_K):
        j = start + lane
        if EVEN_C:
            a = tl.load(a_ptr + rows * C + j[None, :])
            turn = tl.load(turn_ptr + j[:, None] * C + c[None, :])
        else:
            a = tl.load(a_ptr + rows * C + j[None, :], mask=(j < C)[None, :], other=0.0)
            inside = (j < C)[:, None] & (c < C)[None, :]
            turn = tl.load(turn_ptr + j[:, None] * C + c[None, :], mask=inside, other=0.0)
        acc = tl.dot(_operand(a, False, UPCAST), _operand(turn, False, UPCAST), acc)
    acc += tl.load(shift_ptr + c, mask=c < C, other=0.0)[None, :]
    at = m[:, None] * C + c[None, :]
    if EVEN_C:
        tl.store(da_ptr + at, acc.to(da_ptr.dtype.element_ty), mask=(m < M)[:, None])
    else:
        tl.store(da_ptr + at, acc.to(da_ptr.dtype.element_ty), mask=(m < M)[:, None] & (c < C)[None, :])
