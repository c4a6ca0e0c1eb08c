"""Running statistics after one more batch, and the count of batches, in one launch."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["C"])
def _running_stats_kernel(
    running_mean_ptr,  # [C]
    running_var_ptr,  # [C]
    tracked_ptr,  # int64: batches so far, or None
    mean_ptr,  # [C] float32
    var_ptr,  # [C] float32, biased
    unbiased,  # what makes it unbiased: count / (count - 1)
    kept,  # 1 - momentum
    momentum,
    C,
    BLOCK: tl.constexpr,
):
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mean = tl.load(running_mean_ptr + c, mask=c < C, other=0.0).to(tl.float32) * kept
    var = tl.load(running_var_ptr + c, mask=c < C, other=0.0).to(tl.float32) * kept
    mean += tl.load(mean_ptr + c, mask=c < C, other=0.0) * momentum
    var += tl.load(var_ptr + c, mask=c < C, other=0.0) * unbiased * momentum
    tl.store(running_mean_ptr + c, mean.to(running_mean_ptr.dtype.element_ty), mask=c < C)
    tl.store(running_var_ptr + c, var.to(running_var_ptr.dtype.element_ty), mask=c < C)
    if tracked_ptr is not None:
        if tl.program_id(0) == 0:
            tl.store(tracked_ptr, tl.load(tracked_ptr) + 1)
