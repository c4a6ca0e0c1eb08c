"""The command line: each subcommand, its errors, its exit status and the schema of its JSON."""

import json
import re
import socket
import subprocess
import sys
import urllib.error
from pathlib import Path

import numpy
import pytest
import torch
import torchvision
from PIL import Image

from fused_resnet import backends, cli, doctor, measure


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    ramp = torch.linspace(0, 255, 300)
    rgb = torch.stack(
        [ramp.expand(240, 300), ramp.flip(0).expand(240, 300), ramp.sin().expand(240, 300) * 100 + 120], 2
    )
    Image.fromarray(rgb.to(torch.uint8).numpy()).save(path)
    return str(path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "resnet18.pt"
    torch.save(measure.build_model("resnet18", seed=3).state_dict(), path)
    return str(path)


def run(capsys, *argv):
    """(exit status, stdout, stderr) of the command, as the shell would see them."""
    try:
        status = cli.main(list(argv))
    except SystemExit as exit:  # argparse
        status = exit.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


# --- classify ---------------------------------------------------------------------------------------------------------


def test_classify_with_a_checkpoint_file(capsys, photo, checkpoint):
    status, out, _ = run(capsys, "classify", photo, "--model", "resnet18", "--weights", checkpoint)
    assert status == 0
    assert "8 of 8 residual blocks fused" in out
    assert "largest absolute difference of the 1000 logits" in out
    model = torchvision.models.resnet18()
    model.load_state_dict(torch.load(checkpoint, weights_only=True))
    weights = torchvision.models.ResNet18_Weights.DEFAULT
    with torch.no_grad():
        logits = model.eval()(weights.transforms()(Image.open(photo).convert("RGB"))[None])[0]
    for rank, i in enumerate(logits.topk(5)[1].tolist(), 1):
        row = next(line for line in out.splitlines() if f"│ {rank} │" in line)
        assert row.count(weights.meta["categories"][i]) == 2, row


def test_classify_random_says_that_it_means_nothing(capsys, photo):
    first = run(capsys, "classify", photo, "--model", "resnet18", "--random")
    assert first[0] == 0
    assert "meaningless" in first[1]
    assert run(capsys, "classify", photo, "--model", "resnet18", "--random") == first


def test_classify_fails_when_the_models_disagree(capsys, photo, checkpoint, monkeypatch):
    def wrong_by_one_percent(model):
        model.fc.weight.data.mul_(1.01)
        return model

    monkeypatch.setattr(cli, "swap_blocks", wrong_by_one_percent)
    status, out, _ = run(capsys, "classify", photo, "--model", "resnet18", "--weights", checkpoint)
    assert status == cli.DISAGREES
    assert "disagree" in out


def test_classify_takes_a_checkpoint_of_other_classes(capsys, photo, tmp_path):
    state = torchvision.models.resnet18(num_classes=3).state_dict()
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "three.pt")
    status, out, _ = run(capsys, "classify", photo, "--model", "resnet18", "--weights", str(tmp_path / "three.pt"))
    assert status == 0
    assert "class 2" in out and "of the 3 logits" in out


@pytest.mark.parametrize(
    "error",
    [
        urllib.error.URLError(socket.gaierror(-2, "Name or service not known")),
        TimeoutError("timed out"),
        RuntimeError("invalid hash value"),
    ],
    ids=["no-network", "stalled", "broken-file"],
)
def test_a_failed_download_is_one_sentence_with_a_way_out(capsys, photo, monkeypatch, error):
    timeouts = []

    def get_state_dict(self, *args, **kwargs):
        timeouts.append(socket.getdefaulttimeout())
        raise error

    monkeypatch.setattr(torchvision.models.ResNet18_Weights, "get_state_dict", get_state_dict)
    status, _, err = run(capsys, "classify", photo, "--model", "resnet18")
    assert status == cli.NO_WEIGHTS
    assert "--weights FILE" in err and "--random" in err
    assert len(err.strip().splitlines()) == 1
    assert timeouts == [cli.NETWORK_TIMEOUT_S] and socket.getdefaulttimeout() is None


def test_classify_takes_weights_by_name(capsys, photo, checkpoint, monkeypatch):
    asked = []

    def get_state_dict(self, *args, **kwargs):
        asked.append(self.name)
        return torch.load(checkpoint, weights_only=True)

    monkeypatch.setattr(torchvision.models.ResNet18_Weights, "get_state_dict", get_state_dict)
    by_file = run(capsys, "classify", photo, "--model", "resnet18", "--weights", checkpoint)
    for name in ("DEFAULT", "IMAGENET1K_V1"):
        assert run(capsys, "classify", photo, "--model", "resnet18", "--weights", name) == by_file
    assert asked == ["IMAGENET1K_V1"] * 2  # which is the default


def test_a_photo_is_opened_upright_and_in_its_full_range(tmp_path):
    ramp = torch.linspace(0, 65535, 60).expand(40, 60).to(torch.int32).numpy().astype("uint16")
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    values = torch.from_numpy(numpy.array(cli._open(str(tmp_path / "deep.png")))).double()
    assert abs(values.mean().item() - 127.5) < 1 and values.max() == 255
    sideways = Image.new("RGB", (60, 40), "red")
    sideways.paste("blue", (0, 0, 30, 40))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    sideways.save(tmp_path / "sideways.png", exif=exif)
    upright = cli._open(str(tmp_path / "sideways.png"))
    assert upright.size == (40, 60) and upright.getpixel((20, 5)) == (0, 0, 255)


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    (folder / "empty.pt").write_bytes(b"")
    torch.save(torch.nn.Linear(2, 2), folder / "module.pt")
    torch.save({1: torch.ones(2)}, folder / "numbered.pt")
    torch.save({"fc.weight": torch.tensor(1.0)}, folder / "scalar.pt")
    torch.save({"fc.weight": torch.ones(0, 512)}, folder / "classless.pt")
    Image.new("1", (20000, 20000)).save(folder / "bomb.png")
    (folder / "text.txt").write_text("not a picture")
    torch.save([1, 2], folder / "list.pt")
    torch.save(torchvision.models.resnet34().state_dict(), folder / "resnet34.pt")
    return folder


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["{bad}/none.jpg"], "IMAGE: cannot read"),
        (["{bad}/text.txt"], "IMAGE: {bad}/text.txt is not an image"),
        (["{bad}/bomb.png"], "IMAGE: cannot read '{bad}/bomb.png': Image size (400000000 pixels)"),
        (["{photo}", "--weights", "{bad}/empty.pt"], "--weights: {bad}/empty.pt is not a checkpoint"),
        (["{photo}", "--weights", "{bad}/module.pt"], "--weights: {bad}/module.pt is not a checkpoint of tensors"),
        (["{photo}", "--weights", "{bad}/numbered.pt"], "--weights: {bad}/numbered.pt holds no state_dict"),
        (["{photo}", "--weights", "{bad}/scalar.pt"], "fc.weight of shape [], not [classes, features]"),
        (["{photo}", "--weights", "{bad}/classless.pt"], "fc.weight of shape [0, 512], not [classes, features]"),
        (["{photo}", "--weights", "{bad}/none.pt"], "--weights: {bad}/none.pt is neither a file nor one of DEFAULT"),
        (["{photo}", "--weights", "{bad}/text.txt"], "--weights: {bad}/text.txt is not a checkpoint"),
        (["{photo}", "--weights", "{bad}/list.pt"], "--weights: {bad}/list.pt holds no state_dict"),
        (["{photo}", "--weights", "{bad}/resnet34.pt"], "does not fit --model resnet18"),
        (["{photo}", "--random", "--weights", "DEFAULT"], "argument --weights: not allowed with argument --random"),
        (["{photo}", "--device", "tpu"], "--device: expected cpu, cuda"),
        (["{photo}", "--device", "cuda:9"], "--device: cuda:9 was asked for"),
        (["{photo}", "--threads", "0"], "--threads: expected an integer of at least 1"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_wrong_arguments_of_classify_are_named(capsys, photo, bad_files, argv, words):
    fill = {"photo": photo, "bad": str(bad_files)}
    status, _, err = run(capsys, "classify", "--model", "resnet18", *(a.format(**fill) for a in argv))
    assert status == cli.WRONG_ARGUMENT
    assert words.format(**fill) in err


# --- bench ------------------------------------------------------------------------------------------------------------


def test_bench_of_the_optimized_model(capsys, tmp_path, monkeypatch):
    path = tmp_path / "bench.json"
    argv = ["bench", "resnet18", "--batch", "1", "--size", "40", "--seconds", "0.1", "--seeds", "1", "--optimized"]
    status, out, err = run(capsys, *argv, "--json", str(path))
    assert status == 0, out + err
    assert "parity of optimize_for_inference, output: 1 tensors" in " ".join(out.split())
    (case,) = json.loads(path.read_text())["cases"]
    assert case["variants"]["optimized"]["ratio"] > 0 and case["variants"]["optimized"]["peak_mib"] is None
    assert case["parity_optimized"]["ok"]

    untouched, other = (measure.build_model("resnet18", seed=seed) for seed in (0, 1))
    case["parity_optimized"] = measure.parity(untouched, other, [torch.ones(1, 3, 33, 33)])
    monkeypatch.setattr(cli, "run_bench", lambda *args, **options: {"cases": [case]})
    status, out, _ = run(capsys, *argv)
    assert status == cli.DISAGREES and "parity of optimize_for_inference fails" in out
    status, _, err = run(capsys, *argv, "--train")
    assert status == 2 and "--optimized: optimize_for_inference is for inference" in err


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_bench_writes_parity_speed_and_environment(capsys, tmp_path, train):
    path = tmp_path / "bench.json"
    batches = [1] if train else [1, 2]
    argv = ["bench", "resnet18", "--batch", *map(str, batches), "--size", "40", "--seconds", "0.1", "--json", str(path)]
    status, out, err = run(capsys, *argv, *(["--train", "--seeds", "2"] if train else []))
    assert status == 0, out + err
    assert "fused_resnet" in out and "noise" in out
    result = json.loads(path.read_text())
    assert result["schema"] == 1
    assert result["environment"]["torch"] == torch.__version__
    assert [case["batch"] for case in result["cases"]] == batches
    for case in result["cases"]:
        assert case["mode"] == ("train" if train else "eval")
        assert case["parity"]["ok"]
        kinds = {"output", "gradient", "buffer"} if train else {"output"}
        assert set(case["parity"]["nearest"]) == kinds
        assert set(case["variants"]) == {"eager", "channels_last", "fused", "fused_channels_last"}
        for t in case["variants"].values():
            assert 0 < t["p20_ms"] <= t["p50_ms"] <= t["p80_ms"]
            assert t["images_per_s"] == pytest.approx(1e3 * case["batch"] / t["p50_ms"])
            assert t["ratio"] > 0 and t["rounds"] >= 5
        assert case["variants"]["eager"]["ratio"] == 1
        assert case["noise"] >= 0
    if train:
        assert result["cases"][0]["parity"]["nearest"]["gradient"]["tensors"] == 63  # 62 parameters and the input


class WrongGradient(torch.nn.Conv2d):
    """The right output, and a gradient of the weight that is off by one percent."""

    def forward(self, x):
        return self._conv_forward(x, 1.01 * self.weight - 0.01 * self.weight.detach(), None)


@pytest.mark.slow
def test_bench_fails_when_a_gradient_is_wrong_by_one_percent(capsys, monkeypatch):
    def spoiled(model):
        model.layer2[0].conv1.__class__ = WrongGradient
        return model

    monkeypatch.setattr(cli, "swap_blocks", spoiled)
    argv = ["bench", "resnet18", "--batch", "2", "--size", "40", "--seconds", "0", "--seeds", "2", "--train"]
    status, out, _ = run(capsys, *argv)
    assert status == cli.DISAGREES
    assert out.count("parity fails") == 1
    assert "parity fails: gradient of layer2.0.conv1.weight: off by" in out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["resnet19"], "argument MODEL: invalid choice: 'resnet19'"),
        (["resnet18", "--batch", "0"], "--batch: expected an integer of at least 1, got '0'"),
        (["resnet18", "--size", "8"], "--size: expected an integer of at least 32"),
        (["resnet18", "--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
        (["resnet18", "--json", "/nonexistent/x.json"], "--json: cannot write '/nonexistent/x.json'"),
        (["resnet18", "--json", "."], "--json: cannot write '.': Is a directory"),
        (["resnet18", "--json", ""], "--json: cannot write ''"),
        (["resnet18", "--seconds", "nan"], "--seconds: expected a number of seconds, got 'nan'"),
        (["resnet18", "--seconds", "inf"], "--seconds: expected a number of seconds, got 'inf'"),
        (["resnet18", "--seconds", "-1"], "--seconds: expected a number of seconds, got '-1'"),
        (["resnet18", "--train", "--size", "32", "--batch", "1"], "--size: with --train and a batch of 1"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_wrong_arguments_of_bench_are_named(capsys, argv, words):
    status, _, err = run(capsys, "bench", *argv)
    assert status == cli.WRONG_ARGUMENT
    assert words in err


def test_an_earlier_json_outlives_a_wrong_argument(capsys, tmp_path):
    (tmp_path / "old.json").write_text("{}")
    assert run(capsys, "bench", "resnet18", "--json", str(tmp_path / "old.json"), "--device", "cuda:99")[0] == 2
    assert (tmp_path / "old.json").read_text() == "{}"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU for the backend to run on")
@pytest.mark.parametrize("argv", [("bench", "resnet18"), ("classify", "PHOTO", "--model", "resnet18", "--random")])
def test_a_forced_backend_that_cannot_run_is_one_sentence(capsys, photo, argv):
    with backends.backend("cuda"):
        status, _, err = run(capsys, *(photo if a == "PHOTO" else a for a in argv))
    assert status == cli.WRONG_ARGUMENT
    assert err == f"fused-resnet: error: FUSED_RESNET_BACKEND: cuda: {doctor.unavailable()['cuda']}\n"


@pytest.mark.parametrize("command", [("doctor",), ("doctor", "--json"), ("bench", "resnet18")], ids=" ".join)
def test_a_backend_that_does_not_exist_is_one_sentence(capsys, monkeypatch, command):
    monkeypatch.setattr(backends, "_forced", ["cudann"])
    status, _, err = run(capsys, *command)
    assert status == cli.WRONG_ARGUMENT
    assert "FUSED_RESNET_BACKEND: there is no backend 'cudann'; there are cuda, triton" in err


def test_what_nobody_foresaw_is_not_a_disagreement(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "report", lambda: 1 / 0)
    status, _, err = run(capsys, "doctor")
    assert status == cli.FAILED == 4
    assert "ZeroDivisionError" in err


def test_interleaving_times_every_variant_once_a_round():
    order = []
    steps = {name: (lambda name=name: order.append(name)) for name in ("eager", "a", "b")}
    times, again = measure.interleave(steps, torch.device("cpu"), seconds=0)
    assert set(times) == {"eager", "a", "b"}
    assert {len(t) for t in times.values()} == {len(again)} == {5}


# --- doctor -----------------------------------------------------------------------------------------------------------


def test_doctor_prints_versions_backends_and_build(capsys):
    status, out, _ = run(capsys, "doctor")
    assert status == 0
    for name in (
        torch.__version__,
        doctor.environment()["torchvision"],
        *backends.BACKENDS,
        *doctor.OPS,
        *doctor.VARIABLES,
    ):
        assert name in out, name
    for reason in filter(None, doctor.unavailable().values()):
        assert reason.split()[0] in out
    build = out[out.index("build") : out.index("environment variables")]
    for fact in doctor.build_facts():
        assert fact in build, fact


def test_doctor_tells_of_a_backend_that_leaves_a_call_to_the_next(monkeypatch):
    monkeypatch.setattr(backends.cpu, "defers", lambda op, *args: "not on a Tuesday", raising=False)
    assert doctor.choices("cpu", torch.float32)["bn_stats"] == {
        "backend": "reference",
        "declined": ["cpu: not on a Tuesday"],
    }
    with backends.backend("cpu"):
        assert doctor.choices("cpu", torch.float32)["bn_stats"]["backend"] == "cpu"


def test_doctor_json_has_every_op_of_every_device(capsys):
    status, out, _ = run(capsys, "doctor", "--json")
    assert status == 0
    found = json.loads(out)
    assert set(found) == {"environment", "backends", "forced", "choices", "optimize_for_inference", "build"}
    assert set(found["backends"]) == set(backends.BACKENDS)
    built = found["build"].get("ops_library")
    assert "in the package's tables" in found["optimize_for_inference"]["cpu, tuned"]
    assert found["optimize_for_inference"]["cpu float32"].startswith("compiled kernels" if built else "PyTorch's")
    for ops in found["choices"].values():
        assert set(ops) == set(doctor.OPS)
        assert all(c["backend"] in backends.BACKENDS for c in ops.values())


def test_doctor_tells_of_a_forced_backend_that_cannot_run():
    with backends.backend("cudnn"):
        report = doctor.choices("cpu", torch.float32)
    if not torch.cuda.is_available():
        assert report["bn_stats"] == {"backend": None, "declined": [f"cudnn: {doctor.unavailable()['cudnn']}"]}
    else:
        assert report["bn_stats"]["declined"] == ["cudnn: needs CUDA tensors, got cpu"]


@pytest.mark.slow
def test_the_example_trains_alike():
    script = str(Path(__file__).resolve().parent.parent / "examples" / "swap_and_train.py")
    command = [sys.executable, script, "--steps", "2", "--device", "cpu"]
    answer = subprocess.run(command, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    losses = [[float(x) for x in re.findall(r"\d+\.\d+", line)] for line in answer.stdout.splitlines()]
    assert len(losses) == 2
    for untouched, fused in losses:
        assert fused == pytest.approx(untouched, rel=1e-3)


def test_the_module_runs_as_a_program():
    answer = subprocess.run([sys.executable, "-m", "fused_resnet"], capture_output=True, text=True)
    assert answer.returncode == 2
    assert "classify | bench | roofline | zoo | explore | doctor" in answer.stderr


def test_version(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert (ended.value.code, capsys.readouterr().out) == (0, "fused_resnet 0.1.0\n")
