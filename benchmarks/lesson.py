"""The README's account of what residual networks did here, from fused_resnet/explore/results/*.json.

python benchmarks/lesson.py           write it between the markers
python benchmarks/lesson.py --check   fail if the README says anything else
"""

import argparse
import json
import math
import statistics
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # run as a file
    sys.path.insert(0, str(ROOT))

from benchmarks import table  # noqa: E402
from fused_resnet import zoo  # noqa: E402

BEGIN, END = "<!-- lesson: written by benchmarks/lesson.py -->", "<!-- /lesson -->"
RESULTS = ROOT / "fused_resnet" / "explore" / "results"


def render(records: dict[str, dict]) -> str:
    """Markdown: the runs, and what they make of a lesson."""
    runs = Runs(records["degradation"])
    return "\n\n".join((runs.about(), runs.table(), _lesson(runs, records["gradients"])))


class Runs:
    """What examples/degradation.py recorded; figures at the end of training, over seeds."""

    def __init__(self, record: dict):
        self.record = record
        self.groups: dict[tuple[str, int, str], list[dict]] = {}
        for run in record["runs"]:
            self.groups.setdefault((run["block"], run["depth"], run["kind"]), []).append(run)

    def about(self) -> str:
        r, machine = self.record, self.record["machine"]
        text = (
            f"`{r['command']}`: {r['dataset']} ({r['train_images']} images to train, {r['test_images']} to test), "
            f"{r['epochs']} epochs of SGD, learning rate {r['lr']} falling as a cosine, momentum {r['momentum']}, "
            f"weight decay {r['weight_decay']}, batches of {r['batch_size']}; {machine['cpu']}, torch "
            f"{machine['torch']}. "
            "The training loss is that of the network as it ended, in eval mode, over all training images; it and the "
            "accuracy are means over seeds, with their range where there are several."
        )
        return textwrap.fill(text, width=120, break_on_hyphens=False)

    def table(self) -> str:
        header = ["", "parameters", "training loss", "test accuracy", "seeds"]
        lines = [table._row(header), table._row(["---", *["--:"] * 4])]
        for (block, depth, kind), runs in self.groups.items():
            loss = _over([run["train_loss_eval"][-1] for run in runs], "{:.4f}")
            accuracy = _over([100 * run["test_accuracy"][-1] for run in runs], "{:.1f} %")
            what = f"{kind}, {depth} layers" + (", bottlenecks" if block == "bottleneck" else "")
            lines.append(table._row([what, f"{runs[0]['parameters']:,}", loss, accuracy, str(len(runs))]))
        return "\n".join(lines)

    def loss(self, kind: str, depth: int) -> float:
        return statistics.mean(run["train_loss_eval"][-1] for run in self.groups["basic", depth, kind])

    def accuracy(self, kind: str, depth: int) -> float:
        return statistics.mean(run["test_accuracy"][-1] for run in self.groups["basic", depth, kind])


def _over(values: list[float], form: str) -> str:
    mean = form.format(statistics.mean(values))
    return mean if len(values) == 1 else f"{mean} ({form.format(min(values))} to {form.format(max(values))})"


def _lesson(runs: Runs, gradients: dict) -> str:
    numpy, lesson = gradients["numpy"], gradients["numpy"]["lesson"]

    def fades(step: int, kind: str, depth: int = 110) -> float:
        """First layer's gradient over the last's, of post-activation basic blocks."""
        key = ("basic", depth, kind, "post", step)
        found = next(
            s for s in gradients["stacks"] if (s["block"], s["depth"], s["kind"], s["activation"], s["step"]) == key
        )
        norms = [float(v) for v in found["weight_grad_norm"]]
        return norms[0] / norms[-1]

    def weights(name: str) -> str:
        return f"{zoo.entry(name).parameters:,}"

    def losses(kind: str) -> str:
        return ", ".join(f"{runs.loss(kind, depth):.4f}" for depth in (8, 20, 56))

    steps = max(s["step"] for s in gradients["stacks"])
    start, later = ({kind: fades(step, kind) for kind in ("plain", "residual")} for step in (0, steps))
    if not (start["plain"] > 1e3 and later["plain"] < 1e-3):
        raise SystemExit("gradients.json: plain gradients do not explode and then die: that row needs other words")
    rows = [
        (
            f"the ten lines of NumPy print {lesson['plain']:.6f}, {lesson['residual']:.6f} and {lesson['ratio']:.1f}",
            f"{numpy['plain']:.6f}, {numpy['residual']:.6f} and {numpy['ratio']:.1f}; autograd through the fused op "
            f"agrees. The gradient is of eight ones, so the identity alone gives √8 = {math.sqrt(8):.6f}",
        ),
        (
            "gradients die in a deep plain stack, 0.9^100",
            "with batch norm they explode at initialisation: of 110 plain layers the first's is "
            f"{start['plain']:.1e} times the last's (residual: {start['residual']:.1e}); after {steps} steps they have "
            f"died, {later['plain']:.1e} (residual: {later['residual']:.1e})",
        ),
        (
            "without the add a network stops being trainable past a dozen layers",
            f"20 plain layers reach {100 * runs.accuracy('plain', 20):.1f} % on the test images, 56 reach "
            f"{100 * runs.accuracy('plain', 56):.1f} %",
        ),
        (
            "20 plain layers end with a worse training loss than 8; residual ones keep improving",
            f"8, 20 and 56 layers: plain {losses('plain')}; residual {losses('residual')}",
        ),
        ("3 stages of 2 basic blocks are a ResNet-8", "6n + 2 layers: 14; of one block a stage, 8"),
        ("try the bottleneck at 50 layers", "9n + 2 layers: 47 and 56 are, 50 is not"),
        (
            "its parameters drop below those of 20 layers of basic blocks (CIFAR-10)",
            f"47 layers of bottlenecks have {weights('cifar_bottleneck47')}, 20 of basic blocks "
            f"{weights('cifar_resnet20')}",
        ),
        (
            "ResNet-50 has fewer parameters than ResNet-34",
            f"{weights('resnet50')} against {weights('resnet34')}",
        ),
    ]
    lines = [table._row(["what the lesson says", "what runs show"]), table._row(["---", "---"])]
    return "\n".join([*lines, *(table._row(list(row)) for row in rows)])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    missing = [name for name in ("degradation", "gradients") if not (arguments.results / f"{name}.json").is_file()]
    if missing:
        raise SystemExit(f"--results: {arguments.results} has no {missing[0]}.json")
    records = {path.stem: json.loads(path.read_text()) for path in arguments.results.glob("*.json")}
    readme = arguments.readme.read_text()
    new = table.updated(readme, records, BEGIN, END, render)
    if arguments.check:
        if new != readme:
            print(f"README.md does not say what {arguments.results} says: run `python benchmarks/lesson.py`")
        return int(new != readme)
    arguments.readme.write_text(new)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
