"""What `make demo` shows: a ResNet-50 with its blocks swapped, compared, timed, and used on a photo."""

from importlib.resources import as_file, files

import torchvision

import fused_resnet
from fused_resnet.cli import NO_WEIGHTS, main


def demo() -> int:
    model = fused_resnet.swap_blocks(torchvision.models.resnet50())
    print(fused_resnet.swap_report(model))

    worst = main(["bench", "resnet50", "--batch", "1", "8", "--seconds", "10"])
    worst = max(worst, main(["bench", "resnet50", "--train", "--batch", "4", "--seeds", "1", "--seconds", "15"]))

    print("\nA photo of a cat, scikit-image's own:")
    with as_file(files("skimage") / "data" / "chelsea.png") as photo:
        status = main(["classify", str(photo), "--model", "resnet50"])
        if status == NO_WEIGHTS:
            print("Without the trained weights, the same with random ones:")
            status = main(["classify", str(photo), "--model", "resnet50", "--random"])
    return max(worst, status)


if __name__ == "__main__":
    raise SystemExit(demo())
