"""examples/label_folder.py and examples/serve.py: answers are the model's, none is lost, they go on and end well."""

from __future__ import annotations

import importlib
import io
import json
import sys
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
label_folder = importlib.import_module("label_folder")
serve = importlib.import_module("serve")

TRANSFORM = torchvision.models.ResNet18_Weights.DEFAULT.transforms()


def photo(seed: int, size=(64, 48)) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind="PNG", **more) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **more)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = torchvision.models.resnet18()
    with torch.no_grad():
        for _ in range(3):  # statistics like those of pictures, so that no label is everyone's
            model(torch.stack([TRANSFORM(photo(seed)) for seed in range(100, 108)]))
    return model.eval()


@pytest.fixture(autouse=True)
def built(model, monkeypatch):
    """The examples build this model, whatever its weights are called."""
    monkeypatch.setattr(torchvision.models, "get_model", lambda name, weights=None: model)


def expected(model, image: Image.Image, top=5) -> list[tuple[str, float]]:
    with torch.no_grad():
        values, classes = model(TRANSFORM(image.convert("RGB"))[None])[0].softmax(0).topk(top)
    return [(f"class {c}", v) for c, v in zip(classes.tolist(), values.tolist(), strict=True)]


def same(answer: dict, wanted: list[tuple[str, float]]) -> None:
    assert [entry["label"] for entry in answer["labels"]] == [label for label, _ in wanted]
    for entry, (_, probability) in zip(answer["labels"], wanted, strict=True):
        assert entry["probability"] == pytest.approx(probability, rel=1e-3, abs=2e-6)


# --- a folder ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path) -> Path:
    folder = tmp_path / "photos"
    (folder / "deep" / "er").mkdir(parents=True)
    for i in range(7):
        photo(i).save(folder / ("deep/er" if i % 2 else ".") / f"p{i}.png")
    photo(7).convert("L").save(folder / "grey.jpg", quality=100)
    photo(8).convert("RGBA").save(folder / "übergröße.png")
    (folder / "broken.jpg").write_bytes(b"no picture at all")
    (folder / "short.png").write_bytes(encoded(photo(9))[:200])
    (folder / "notes.txt").write_text("not looked at")
    return folder


def run(folder: Path, out: Path, *more: str) -> list[dict]:
    options = ["--weights", "none", "--model", "resnet18", "--batch", "4", "--threads", "2", "--device", "cpu"]
    assert label_folder.main([str(folder), str(out), *options, "--dtype", "float32", *more]) == 0
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def test_every_picture_has_its_line(pictures, tmp_path, model, monkeypatch):
    plans, real = [], label_folder.fused_resnet.optimize_for_inference
    monkeypatch.setattr(
        label_folder.fused_resnet, "optimize_for_inference", lambda *a, **k: plans.append(real(*a, **k)) or plans[-1]
    )
    lines = run(pictures, tmp_path / "out.jsonl", "--top", "3")
    names = {str(p.relative_to(pictures)) for p in pictures.rglob("*") if p.is_file()} - {"notes.txt"}
    assert sorted(line["file"] for line in lines) == sorted(names) and len(names) == 11
    for line in lines:
        if line["file"] in ("broken.jpg", "short.png"):
            assert "labels" not in line and line["error"]
        else:
            same(line, expected(model, Image.open(pictures / line["file"]), top=3))
    assert len(plans) == 1 and len(plans[0].plans) == 1  # the last batch was filled up
    run(pictures, tmp_path / "again.jsonl", "--tune", "off")
    assert plans[0]._tune == "full" and plans[1]._tune == "off"


def test_it_goes_on_where_it_stopped(pictures, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    whole = run(pictures, out)
    text = out.read_bytes()
    lines = text.splitlines(keepends=True)
    for cut in (len(text) - 5, sum(map(len, lines[:4])), sum(map(len, lines[:6])) + 1, 0):
        out.write_bytes(text[:cut])
        again = run(pictures, out)
        assert sorted(again, key=lambda line: line["file"]) == sorted(whole, key=lambda line: line["file"])
    capsys.readouterr()
    run(pictures, out)
    assert "11 pictures" in (said := capsys.readouterr().out) and "11 of them in" in said


def test_a_folder_without_pictures_and_arguments_that_cannot_be(tmp_path, capsys):
    assert label_folder.main([str(tmp_path), str(tmp_path / "out.jsonl")]) == 0
    for wrong, words in (
        ([str(tmp_path / "none"), "out"], "is no folder"),
        ([str(tmp_path), "out", "--batch", "0"], "argument --batch: expected an integer of at least 1, got '0'"),
        ([str(tmp_path), "out", "--dtype", "int8"], "invalid choice"),
    ):
        with pytest.raises(SystemExit):
            label_folder.main(wrong)
        assert words in capsys.readouterr().err
    with pytest.raises(
        SystemExit, match="--weights: resnet18 has IMAGENET1K_V1, DEFAULT or none, not v9|has .* or none"
    ):
        label_folder.named_weights("resnet18", "v9")


def test_pictures_of_sixteen_bits(tmp_path):
    grey = np.asarray(photo(3).convert("L"))
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    found = label_folder.picture(tmp_path / "deep.png", TRANSFORM)
    torch.testing.assert_close(found, TRANSFORM(Image.fromarray(grey).convert("RGB")))


def test_weights_that_cannot_be_fetched(pictures, tmp_path, monkeypatch):
    def offline(name, weights=None):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torchvision.models, "get_model", offline)
    with pytest.raises(SystemExit, match="^--weights: they could not be fetched .*no network.*`--weights none`"):
        label_folder.main([str(pictures), str(tmp_path / "out.jsonl"), "--device", "cpu"])


# --- a server ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def server():
    options = serve.parser().parse_args(
        "--weights none --model resnet18 --batch 4 --wait 20 --device cpu --dtype float32 --port 0".split()
    )
    server = serve.serving(options)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.finish()


def ask(server, body: bytes | None, **headers) -> tuple[int, dict]:
    request = urllib.request.Request(f"http://127.0.0.1:{server.server_address[1]}/", body, headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def test_everybody_gets_their_own_answer(server, model):
    with ThreadPoolExecutor(9) as pool:
        answers = list(pool.map(lambda i: ask(server, encoded(photo(i))), range(18)))
    for i, (status, answer) in enumerate(answers):
        assert status == 200
        same(answer, expected(model, photo(i)))
    status, counted = ask(server, None)
    assert status == 200 and counted["pictures"] == 18
    assert (
        sum(int(n) * times for n, times in counted["batches"].items()) == 18 and max(map(int, counted["batches"])) <= 4
    )
    assert len(server.batcher.fast.plans) == 3  # 1, 2 and 4: no request had to wait for one


def test_requests_that_come_together_are_one_batch(server):
    server.batcher.wait = 5.0
    with ThreadPoolExecutor(4) as pool:
        assert {status for status, _ in pool.map(lambda i: ask(server, encoded(photo(i))), range(4))} == {200}
    assert dict(server.batcher.batches) == {4: 1}


def test_bad_requests_harm_nobody_else(server, model, monkeypatch):
    assert ask(server, b"no picture") == (400, {"error": "not a picture that can be read: UnidentifiedImageError"})
    assert ask(server, b"")[0] == 411
    monkeypatch.setattr(serve, "LARGEST", 100)
    assert ask(server, b"x" * 101)[0] == 413
    monkeypatch.undo()
    real = server.batcher.fast

    def failing(x):
        raise RuntimeError("out of memory")

    server.batcher.fast = failing
    assert ask(server, encoded(photo(1))) == (503, {"error": "RuntimeError: out of memory"})
    server.batcher.fast = real
    status, answer = ask(server, encoded(photo(1), "JPEG", quality=100))
    assert status == 200 and len(answer["labels"]) == 5


def test_what_was_submitted_is_answered_before_the_end(model):
    batcher = serve.Batcher(model, TRANSFORM(photo(0)), largest=3, wait=10.0, tune="cached")
    assert batcher.sizes == [1, 2, 4]
    futures = [batcher.submit(TRANSFORM(photo(i))) for i in range(5)]
    batcher.start()
    batcher.stop()
    with torch.no_grad():
        for i, future in enumerate(futures):
            torch.testing.assert_close(future.result(0), model(TRANSFORM(photo(i))[None])[0], rtol=1e-3, atol=1e-3)
    assert dict(batcher.batches) == {3: 1, 2: 1}
