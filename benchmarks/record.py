"""Measure the figures of the README on this machine: benchmarks/results/<device>.json, one file a device.

    python benchmarks/record.py [--device cpu|cuda] [--models resnet18 resnet50] [--seconds 20] [--no-compile]
    python benchmarks/record.py --modes train --name cpu-avx2   # again: these cases of a file that is there
    python benchmarks/table.py         # then: the README's table from the files

Run it on a machine that does nothing else; the load it found is in the file. torch.compile takes most of the time.
"""

import argparse
import json
import os
from pathlib import Path

import torch
from rich.console import Console

from fused_resnet import cli

RESULTS = Path(__file__).parent / "results"
# device -> (training, batch sizes, dtypes)
PLANS = {
    "cpu": ((False, (1, 8), ("float32",)), (True, (8,), ("float32",))),
    "cuda": ((False, (1, 32, 128), ("float16", "bfloat16")), (True, (32, 128, 256), ("float16", "bfloat16"))),
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=PLANS)
    parser.add_argument("--models", nargs="+", default=["resnet18", "resnet50"])
    parser.add_argument("--modes", nargs="+", default=["eval", "train"], choices=["eval", "train"])
    parser.add_argument("--name", help="of the file, without .json; the device's name by default")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--seconds", type=float, default=20.0, help="for each batch size")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)

    console = Console(width=120, highlight=False)
    result = {"load_before": os.getloadavg()[0]}
    for model in arguments.models:
        for train, batches, dtypes in PLANS[arguments.device]:
            if ("train" if train else "eval") not in arguments.modes:
                continue
            for dtype in dtypes:
                found = cli.run_bench(
                    model,
                    batches=batches,
                    size=arguments.size,
                    train=train,
                    compiled=arguments.compile,
                    dtype=getattr(torch, dtype),
                    device=torch.device(arguments.device),
                    seconds=arguments.seconds,
                    seeds=arguments.seeds,
                )
                for case in found["cases"]:
                    cli.show_case(case, console)
                result = {**found, **result, "cases": [*result.get("cases", []), *found["cases"]]}
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"{arguments.name or arguments.device}.json"
    measured = result["cases"]
    if len(arguments.modes) < 2 and path.exists():
        result = merged(json.loads(path.read_text()), result)
    path.write_text(json.dumps(result, indent=1) + "\n")
    console.print(f"written: {path.name}")
    return 0 if all(case["parity"]["ok"] for case in measured) else 1


def merged(before: dict, now: dict) -> dict:
    """A file's contents with the cases of `now` in the places of those they measure again.

    Raises SystemExit if they were measured on another kind of machine or with other versions.
    """
    differing = [k for k in ("cpu", "gpus", "torch", "torchvision", "threads") if _fact(before, k) != _fact(now, k)]
    if differing:
        raise SystemExit(f"--modes: the file is of another machine or version: {', '.join(differing)} differ")
    again = {_kind(case): case for case in now["cases"]}
    cases = [again.pop(_kind(case), case) for case in before["cases"]]
    return {**before, "cases": [*cases, *again.values()]}


def _fact(result: dict, key: str):
    return result["environment"].get(key)


def _kind(case: dict) -> tuple:
    return tuple(case[key] for key in ("model", "mode", "batch", "size", "dtype", "device"))


if __name__ == "__main__":
    raise SystemExit(main())
