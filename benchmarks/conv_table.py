"""The table of convolutions that were timed."""

from __future__ import annotations

from collections.abc import Iterator


def table(done: dict[str, dict]) -> Iterator[str]:
    """A line a shape: TFLOP/s of cuDNN, of the best instance and of Triton's best."""
    rows = {case: line["tflops"] for case, line in done.items() if "tflops" in line}
    if not rows:
        return
    yield f"  {'TFLOP/s':<44} {'cuDNN':>7} {'compiled':>9} {'Triton':>7}  compiled / cuDNN"
    for case, speeds in rows.items():
        best = {}
        for name, speed in speeds.items():
            best.setdefault(name.split(":")[0], (0.0, ""))
            best[name.split(":")[0]] = max(best[name.split(":")[0]], (speed, name))
        told = [best.get(kind, (float("nan"), ""))[0] for kind in ("cuDNN", "cuda", "triton")]
        which = best.get("cuda", (0, ""))[1].removeprefix("cuda: ")
        ratio = f"{told[1] / told[0]:.2f}" if told[0] else "-"
        yield f"  {case:<44} {told[0]:7.1f} {told[1]:9.1f} {told[2]:7.1f}  {ratio} {which}"
