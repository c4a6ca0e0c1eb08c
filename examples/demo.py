"""What `make demo` shows: a ResNet-50 with its blocks swapped, compared, timed, and used on a photo."""

import statistics
import time
from importlib.resources import as_file, files

import torch
import torchvision

import fused_resnet
from fused_resnet.cli import NO_WEIGHTS, main


def whole_network(model: torch.nn.Module) -> None:
    x = torch.randn(1, 3, 224, 224)
    start = time.perf_counter()
    fast = fused_resnet.optimize_for_inference(model.eval(), x)
    ready = time.perf_counter() - start
    with torch.inference_mode():
        expected = model(x)
        error = ((fast(x) - expected).norm() / expected.norm()).item()
        print(str(fast.plan).splitlines()[0])
        print(f"ready after {ready:.1f} s; differs from the swapped model by {error:.0e} of the result's norm")
        times = {"swapped": [], "planned": []}
        for _ in range(10):
            for name, run in (("swapped", model), ("planned", fast)):
                start = time.perf_counter()
                run(x)
                times[name].append(1e3 * (time.perf_counter() - start))
    print(", ".join(f"{name} {statistics.median(t):.1f} ms" for name, t in times.items()) + " (medians of 10, batch 1)")


def demo() -> int:
    model = fused_resnet.swap_blocks(torchvision.models.resnet50())
    print(fused_resnet.swap_report(model))

    worst = main(["bench", "resnet50", "--batch", "1", "8", "--seconds", "10"])
    worst = max(worst, main(["bench", "resnet50", "--train", "--batch", "4", "--seeds", "1", "--seconds", "15"]))

    print("\nThe whole network as one planned program:")
    whole_network(model)

    print("\nA photo of a cat, scikit-image's own:")
    with as_file(files("skimage") / "data" / "chelsea.png") as photo:
        status = main(["classify", str(photo), "--model", "resnet50"])
        if status == NO_WEIGHTS:
            print("Without the trained weights, the same with random ones:")
            status = main(["classify", str(photo), "--model", "resnet50", "--random"])
    return max(worst, status)


if __name__ == "__main__":
    raise SystemExit(demo())
