"""`explore`: the records that it takes, the file that it writes, and, where there is a Chromium, the page in use."""

from __future__ import annotations

import copy
import html.parser
import io
import json
import math
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import explore_records
import numpy
import pytest
from browser import Browser, find
from PIL import Image

from fused_resnet import cli, explore

ROOT = Path(__file__).parent.parent
SOURCES = ("page.html", "page.css", *explore.SCRIPTS)
RECORDS = {"degradation": explore_records.degradation(), "gradients": explore_records.gradients()}
VOID = {"meta", "link", "input", "br"}
KINDS = ("plain", "residual")


def folder_of(folder: Path, records: dict = RECORDS) -> Path:
    folder.mkdir(exist_ok=True)
    for name, record in records.items():
        (folder / f"{name}.json").write_text(json.dumps(record))
    return folder


def write(folder: Path, records: dict = RECORDS) -> Path:
    out = folder / "explore.html"
    assert cli.main(["explore", "--out", str(out), "--results", str(folder_of(folder / "results", records))]) == 0
    return out


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("explore"))


# --- the file ---------------------------------------------------------------------------------------------------------


class Reader(html.parser.HTMLParser):
    """Tags that close what is open, ids, and what refers to them."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.ids, self.refers, self.attributes, self.records = [], [], [], [], ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.attributes += [(tag, name, value) for name, value in attributes]
        self.ids += [found["id"]] if "id" in found else []
        self.refers += [found[name] for name in ("for", "aria-labelledby") if name in found]
        if tag not in VOID:
            self.open.append((tag, found.get("id")))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data):
        if self.open and self.open[-1] == ("script", "records"):
            self.records += data


def test_it_is_one_well_formed_page_that_holds_the_records(page):
    text = page.read_text(encoding="utf-8")
    reader = Reader(text)
    assert json.loads(reader.records) == RECORDS
    assert len(reader.ids) == len(set(reader.ids))
    asked = re.findall(r'\$\("([\w-]+)"\)|new Plot\("([\w-]+)"', text)
    assert set(reader.refers) | {a or b for a, b in asked} <= set(reader.ids)
    assert not re.search(r"\[\[\w+\]\]", text)


def test_it_loads_nothing(page):
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"https?:|[\"'(=]//|@import|url\(|fetch\(|XMLHttpRequest|WebSocket|import\(|\bsrc *=", text)
    assert [v for _, name, v in Reader(text).attributes if name in ("src", "href", "action", "srcset")] == ["data:,"]
    assert "default-src 'none'" in text


def test_the_same_records_make_the_same_file(page, tmp_path):
    assert write(tmp_path).read_bytes() == page.read_bytes()


@pytest.mark.skipif(shutil.which("node") is None, reason="no node to check the script's syntax with")
def test_the_script_parses(page, tmp_path):
    script = tmp_path / "page.js"
    script.write_text(page.read_text(encoding="utf-8").rpartition("<script>")[2].partition("</script>")[0])
    subprocess.run(["node", "--check", script], check=True)


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_text_has_contrast(theme):
    rules = re.findall(r":root \{(.+?)\}", (explore.HERE / "page.css").read_text(), re.DOTALL)
    colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6});", rules[theme]))
    for ink in ("ink", "soft", "plain", "residual", "relu"):
        for ground in ("paper", "raised") + (("faint",) if ink in ("ink", "soft") else ()):
            dark, light = sorted(luminance(colours[name]) for name in (ink, ground))
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (ink, ground)


def test_a_wheel_has_it(tmp_path):
    """What build_py lays out is what a wheel holds."""
    steps = ["egg_info", "--egg-base", tmp_path, "build_py", "--build-lib", tmp_path / "lib"]
    subprocess.run([sys.executable, "setup.py", "-q", *steps], cwd=ROOT, check=True, capture_output=True)
    results = [f"results/{path.name}" for path in (explore.HERE / "results").glob("*.json")]
    assert all((tmp_path / "lib/fused_resnet/explore" / name).is_file() for name in (*SOURCES, *results))


def test_the_records_of_the_package(tmp_path):
    found = {name: explore.HERE / "results" / f"{name}.json" for name in explore.RECORDS}
    assert cli.main(["explore", "--out", str(tmp_path / "explore.html")]) == 0
    embedded = json.loads(Reader((tmp_path / "explore.html").read_text(encoding="utf-8")).records)
    assert embedded == {name: json.loads(path.read_text()) for name, path in found.items()}


# --- what is wrong is said --------------------------------------------------------------------------------------------


def changed(name: str, *path, value) -> dict:
    """The records with one value replaced."""
    records = copy.deepcopy(RECORDS)
    place = records[name]
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return records


WRONG = {
    "no runs": (changed("degradation", "runs", value=[]), "runs: expected a list that is not empty, got []"),
    "a run": (changed("degradation", "runs", 1, value=7), "runs[1]: expected an object, got 7"),
    "kind": (
        changed("degradation", "runs", 0, "kind", value="odd"),
        'runs[0].kind: expected plain or residual, got "odd"',
    ),
    "depth": (changed("gradients", "stacks", 2, "depth", value="8"), 'stacks[2].depth: expected an integer, got "8"'),
    "step": (changed("gradients", "stacks", 0, "step", value=None), "stacks[0].step: expected an integer, got null"),
    "loss": (
        changed("degradation", "runs", 3, "train_loss", value=[1, "much"]),
        'runs[3].train_loss: expected a list of numbers, got [1, "much"]',
    ),
    "layers": (
        changed("gradients", "stacks", 0, "layers", value=["conv1"]),
        'stacks[0].layers: expected the names of 7 layers, got ["conv1"]',
    ),
    "a list": (RECORDS | {"gradients": [1]}, "stacks: expected a list that is not empty, got null"),
    "NaN": (changed("gradients", "stacks", 0, "loss", value=math.nan), "NaN is not JSON"),
}


@pytest.mark.parametrize("records, message", WRONG.values(), ids=WRONG)
def test_malformed_records(tmp_path, capsys, records, message):
    out = tmp_path / "explore.html"
    assert cli.main(["explore", "--out", str(out), "--results", str(folder_of(tmp_path / "results", records))]) == 2
    error = capsys.readouterr().err
    assert "error: --results: " in error and message in error
    assert not out.exists()


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe{}"], ids=["half", "no text"])
def test_a_file_that_is_not_json(tmp_path, capsys, content):
    (folder_of(tmp_path / "results") / "gradients.json").write_bytes(content)
    assert cli.main(["explore", "--out", str(tmp_path / "e.html"), "--results", str(tmp_path / "results")]) == 2
    assert f"--results: {tmp_path / 'results' / 'gradients.json'}: " in capsys.readouterr().err


def test_files_and_folders_that_are_not_there(tmp_path, capsys):
    results = folder_of(tmp_path / "results")
    (tmp_path / "file").touch()
    (folder_of(tmp_path / "half") / "gradients.json").unlink()
    cases = [
        (tmp_path, results, f"--out: cannot write '{tmp_path}': Is a directory"),
        (tmp_path / "none" / "e.html", results, f"--out: cannot write '{tmp_path}/none/e.html': No such file"),
        (tmp_path / "e.html", tmp_path / "none", f"--results: cannot read '{tmp_path}/none/degradation.json': No such"),
        (tmp_path / "e.html", tmp_path / "file", "--results: cannot read "),
        (tmp_path / "e.html", tmp_path / "half", f"--results: cannot read '{tmp_path}/half/gradients.json': No such"),
    ]
    for out, folder, message in cases:
        assert cli.main(["explore", "--out", str(out), "--results", str(folder)]) == 2
        assert f"fused-resnet: error: {message}" in capsys.readouterr().err
    assert not (tmp_path / "e.html").exists()


# --- the page in a browser --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    path = find()
    if path is None:
        pytest.skip("no Chromium: put one on PATH, or name it in FUSED_RESNET_CHROMIUM")
    browser = Browser(path, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def browser(chromium, page):
    """The page, opened at 1280 x 900; whatever a test does, it asks for nothing else and complains of nothing."""
    chromium.complaints.clear()
    chromium.requests.clear()
    chromium.look(width=1280)
    chromium.open(page.as_uri())
    yield chromium
    assert chromium.complaints == []
    assert {url.partition("#")[0] for url in chromium.requests} <= {page.as_uri(), "about:blank", "data:,"}


def stack(kind, depth=20, activation="post", step=0) -> dict:
    wanted = {"kind": kind, "depth": depth, "activation": activation, "step": step}
    return next(s for s in RECORDS["gradients"]["stacks"] if wanted.items() <= s.items())


def runs(kind, depth) -> list[dict]:
    return [r for r in RECORDS["degradation"]["runs"] if (r["kind"], r["depth"]) == (kind, depth)]


def drawn(browser, plot: str, kind: str) -> list[float]:
    """The values of the corners of the thick path, by the marks of the axis, which is logarithmic."""
    ticks, path = browser.js(
        f"""(() => {{
          const plot = document.getElementById("{plot}");
          return [[...plot.querySelectorAll("[data-value]")].map(t => [t.dataset.value, t.getAttribute("y") - 4]),
            plot.querySelector(".series.{kind} path.mean").getAttribute("d")];
        }})()"""
    )
    (low, y0), (high, y1) = [(math.log10(float(value)), y) for value, y in (ticks[0], ticks[-1])]
    corners = [float(corner.split()[1]) for corner in re.split("[ML]", path)[1:]]
    return [10 ** (low + (y - y0) * (high - low) / (y1 - y0)) for y in corners]


def click(browser, selector: str) -> None:
    x, y = browser.js(
        f"""(() => {{
          const element = document.querySelector({json.dumps(selector)});
          element.scrollIntoView({{block: "center", behavior: "instant"}});
          const box = element.getBoundingClientRect();
          return [box.x + box.width / 2, box.y + box.height / 2];
        }})()"""
    )
    for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
        browser.mouse(kind, x, y)


def pick(browser, name: str, value) -> None:
    click(browser, f'[name="{name}"][value="{value}"]')


def values(browser, selector: str) -> list[float]:
    return [float(v) for v in browser.js(f"[...document.querySelectorAll('{selector} data')].map(d => d.value)")]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [360, 768, 1280, 1600])
def test_every_width_and_theme(browser, page, width, dark):
    browser.look(width=width, dark=dark)
    browser.open(page.as_uri())
    for selector in ("#gradient-plot", "#loss-curve", "#numpy-table"):
        browser.js(f"document.querySelector('{selector}').scrollIntoView({{block: 'center', behavior: 'instant'}})")
        image = Image.open(io.BytesIO(browser.screenshot())).convert("RGB")
        pixels = numpy.asarray(image)
        assert pixels.shape == (900, width, 3)
        assert len(image.getcolors(pixels.size)) > 100
        assert (numpy.median(pixels) < 60) if dark else (numpy.median(pixels) > 200)
    wider = "[...document.querySelectorAll('body *')].filter(e => e.scrollWidth > innerWidth && !e.closest('.scroll'))"
    assert browser.js("document.documentElement.scrollWidth") == width
    assert browser.js(f"{wider}.length") == 0


def test_the_shortcut_switches_what_is_drawn(browser):
    def check(on, **chosen):
        kind, other = ("residual", "plain") if on else ("plain", "residual")
        norms = stack(kind, **chosen)["weight_grad_norm"]
        assert drawn(browser, "gradient-plot", kind) == pytest.approx(norms, rel=0.02)
        assert browser.js(f"document.querySelector('#gradient-plot .series.{other}').matches('.faint')")
        assert not browser.js(f"document.querySelector('#gradient-plot .series.{kind}').matches('.faint')")
        shown = [norms[0], norms[-1], norms[0] / norms[-1], stack(kind, **chosen)["loss"]]
        assert values(browser, "#gradient-facts") == pytest.approx(shown, rel=1e-12)
        skip = browser.js("getComputedStyle(document.querySelector('#diagram .skip')).visibility")
        assert skip == ("visible" if on else "hidden")

    check(True)
    click(browser, "#shortcut")
    check(False)
    pick(browser, "gradient-step", 50)
    check(False, step=50)
    click(browser, "#shortcut")
    pick(browser, "gradient-activation", "pre")
    check(True, step=50, activation="pre")


def test_where_the_relus_are(browser):
    def boxes():
        texts = "[...document.querySelectorAll('#diagram .box text')]"
        return browser.js(f"{texts}.map(t => [+t.getAttribute('y'), t.textContent]).sort((a, b) => a[0] - b[0])")

    plus = "+document.querySelector('#diagram .skip circle').getAttribute('cy')"
    post, added = boxes(), browser.js(plus)
    assert [name for _, name in post] == ["3×3 conv", "batch norm", "ReLU", "3×3 conv", "batch norm", "ReLU"]
    assert [name for y, name in post if y > added] == ["ReLU"]
    pick(browser, "gradient-activation", "pre")
    pre, added = boxes(), browser.js(plus)
    assert [name for _, name in pre] == ["batch norm", "ReLU", "3×3 conv", "batch norm", "ReLU", "3×3 conv"]
    assert not [name for y, name in pre if y > added]
    assert "no ReLU after it" in browser.js("document.getElementById('diagram').getAttribute('aria-label')")


def test_block_inputs(browser):
    pick(browser, "gradient-of", "blocks")
    assert drawn(browser, "gradient-plot", "residual") == pytest.approx(stack("residual")["block_grad_norm"], rel=0.02)


def test_what_no_scale_can_show_is_shown(browser):
    pick(browser, "gradient-depth", 8)
    glyphs = "[...document.querySelectorAll('#gradient-plot .plain .glyph')].map(t => t.textContent)"
    assert browser.js(glyphs) == ["▽", "△", "×"]
    assert drawn(browser, "gradient-plot", "plain") == pytest.approx(
        [v for v in stack("plain", 8)["weight_grad_norm"] if isinstance(v, float)], rel=0.02
    )
    cells = browser.js("[...document.querySelectorAll('#gradient-table tbody tr')].map(r => r.cells[1].textContent)")
    assert cells[1:4] == ["0", "∞", "not a number"]
    assert "▽ zero, △ infinite, × not a number" in browser.js("document.getElementById('gradient-note').textContent")


def test_what_is_not_recorded_is_not_drawn(browser):
    pick(browser, "gradient-activation", "pre")
    click(browser, "#shortcut")
    assert browser.js("document.querySelector('#gradient-plot .plain path.mean').getAttribute('d')") == ""
    assert browser.js("document.querySelector('#gradient-plot .absent').textContent") == "not recorded"
    assert browser.js("document.getElementById('gradient-facts').textContent").count("not recorded") == 4


def test_a_choice_that_was_not_recorded_moves_to_the_nearest(browser):
    def chosen():
        return browser.js("[...document.querySelectorAll('#gradient-controls :checked')].map(e => e.value)")

    pick(browser, "gradient-step", 50)
    assert chosen() == ["post", "20", "50", "basic", "weights"]
    pick(browser, "gradient-block", "bottleneck")
    assert chosen() == ["pre", "29", "0", "bottleneck", "weights"]
    assert drawn(browser, "gradient-plot", "residual") == pytest.approx(
        next(s for s in RECORDS["gradients"]["stacks"] if s["depth"] == 29 and s["kind"] == "residual")[
            "weight_grad_norm"
        ],
        rel=0.02,
    )
    pick(browser, "gradient-depth", 8)
    assert chosen() == ["pre", "8", "0", "basic", "weights"]


def check_depth(browser, depth: int) -> None:
    assert browser.js("document.getElementById('depth-out').textContent") == str(depth)
    for kind in KINDS:
        found = runs(kind, depth)
        expected = [
            statistics.fmean(r["train_loss_eval"][-1] for r in found),
            statistics.fmean(r["test_accuracy"][-1] for r in found),
            found[0]["parameters"],
            depth,
        ]
        assert values(browser, f".card.{kind}") == pytest.approx(expected, rel=1e-12)
        curve = [statistics.fmean(losses) for losses in zip(*(r["train_loss"] for r in found), strict=True)]
        assert drawn(browser, "loss-curve", kind) == pytest.approx(curve, rel=0.02)
        assert browser.js(f"document.querySelectorAll('#loss-curve .{kind} path.seed').length") == len(found)
    text = browser.js("document.querySelector('.card.plain .accuracy dd').textContent")
    accuracies = [100 * r["test_accuracy"][-1] for r in runs("plain", depth)]
    assert text == f"{statistics.fmean(accuracies):.1f} %{min(accuracies):.1f} % to {max(accuracies):.1f} %"


def test_the_depth_slider(browser):
    check_depth(browser, 56)
    browser.js("document.getElementById('depth').focus()")
    for key, depth in (("ArrowLeft", 20), ("Home", 8), ("ArrowRight", 20), ("End", 56)):
        browser.press(key)
        check_depth(browser, depth)
    left, right, y = browser.js(
        """(() => {
          const slider = document.getElementById("depth");
          slider.scrollIntoView({block: "center", behavior: "instant"});
          const box = slider.getBoundingClientRect();
          return [box.left + 8, box.right - 8, box.y + box.height / 2];
        })()"""
    )
    browser.mouse("mouseMoved", right, y)
    browser.mouse("mousePressed", right, y)
    for share, depth in ((0.9, 56), (0.6, 20), (0.4, 20), (0.1, 8)):
        browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=left + share * (right - left), y=y, button="left")
        check_depth(browser, depth)
    browser.mouse("mouseReleased", left, y)


def test_final_points_lie_at_recorded_depths_alone(browser):
    counts = "['mean', 'seed'].map(c => document.querySelectorAll(`#loss-plot circle.${c}`).length)"
    assert browser.js(counts) == [6, 18]  # 3 depths, plain and residual, 3 seeds
    labels = browser.js("[...document.querySelectorAll('#depth-stops span')].map(s => s.textContent)")
    assert labels == ["8", "20", "56"]


def test_the_numpy_table(browser):
    recorded = RECORDS["gradients"]["numpy"]
    rows = [
        [source[name] for source in (recorded["lesson"], recorded, recorded["autograd"])] for name in (*KINDS, "ratio")
    ]
    assert values(browser, "#numpy-table") == [v for row in rows for v in row]
    texts = browser.js("[...document.querySelectorAll('#numpy-table data')].map(d => d.textContent)")
    assert texts == ["0.000046"] * 3 + ["1.000046"] * 3 + ["21817.5"] * 3
    note = "document.getElementById('numpy-note').textContent"
    assert browser.js(note) == (
        "NumPy and autograd differ by 2.5 × 10⁻¹⁶ of the gradient. The lesson prints the same digits."
    )


def test_where_the_lesson_prints_other_digits_than_its_lines(browser, tmp_path):
    browser.open(write(tmp_path, changed("gradients", "numpy", "residual", value=2.828725)).as_uri())
    assert "√8 ≈ 2.83, so the 1.00 cannot come" in browser.js("document.getElementById('numpy-note').textContent")
    browser.requests.clear()


def test_beside_the_figures_stands_where_they_come_from(browser):
    text = browser.js("['gradient', 'depth', 'numpy'].map(n => document.getElementById(`${n}-record`).textContent)")
    for name, shown in zip(("gradients", "degradation", "gradients"), text, strict=True):
        assert RECORDS[name]["command"] in shown and RECORDS[name]["machine"]["cpu"] in shown
    for part in (RECORDS["degradation"]["dataset"], "1,437 training", "360 test", "epochs 5", "0, 1, 2"):
        assert part in text[1]


def test_with_the_keyboard_alone(browser):
    """Tab goes through every control, each shows that it has the focus, and keys do what the mouse does."""
    names, rings = [], []
    for _ in range(40):
        browser.press("Tab")
        found = browser.js(
            """(() => {
              const e = document.activeElement, ring = getComputedStyle(e.type === "radio" ? e.nextElementSibling : e);
              return [e.id || e.name || e.closest("figure")?.id || e.tagName, parseFloat(ring.outlineWidth)];
            })()"""
        )
        if found[0] == "BODY":
            break
        names.append(found[0])
        rings.append(found[1])
        if found[0] == "shortcut":
            browser.press(" ")
            assert browser.js("document.querySelector('#gradient-facts').matches('.plain')")
        if found[0] == "gradient-step":
            browser.press("ArrowRight")
        if found[0] == "gradient-plot":
            browser.press("End", "ArrowLeft")
            told = browser.js("document.activeElement.getAttribute('aria-valuetext')")
            place, last = stack("plain", step=50)["layers"][-2], stack("plain", step=50)["weight_grad_norm"][-2]
            assert told.startswith(f"{place}: plain {last:.3}, residual ")
        if found[0] == "accuracy-plot":
            browser.press("Home", "Enter")
    order = [
        "gradient-activation",
        "gradient-depth",
        "gradient-step",
        "gradient-block",
        "gradient-of",
        "shortcut",
        "gradient-plot",
    ]
    order += ["SUMMARY", "BUTTON", "depth", "loss-plot", "loss-curve", "accuracy-plot", "accuracy-curve", "SUMMARY"]
    assert names == [*order, "BUTTON", "numpy-table", "BUTTON"]
    assert min(rings) >= 2
    check_depth(browser, 8)


def test_every_control_has_a_name(browser):
    nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
    controls = [n for n in nodes if n.get("role", {}).get("value") in ("slider", "switch", "radio", "button", "image")]
    assert len(controls) == 22  # 11 radio buttons, 2 switches and sliders, 5 charts, 3 buttons, the diagram
    assert all(n["name"]["value"].strip() for n in controls)


def test_the_address_holds_the_state(browser, page):
    click(browser, "#shortcut")
    pick(browser, "gradient-depth", 8)
    browser.js("document.getElementById('depth').focus()")
    browser.press("Home")
    address = browser.js("location.href")
    state = "[document.getElementById('shortcut').checked, document.getElementById('depth-out').textContent,"
    state += "document.querySelector('[name=gradient-depth]:checked').value]"
    browser.open(page.as_uri())
    assert browser.js(state) == [True, "56", "20"]
    browser.open(address)
    assert browser.js(state) == [False, "8", "8"]
    browser.js("location.hash = 'shortcut=on&gradient.depth=999&training.depth=20&odd=1'")
    browser.until(f"JSON.stringify({state}) === JSON.stringify([true, '20', '8'])")


@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_moves_when_values_change(browser, page, width):
    browser.look(width=width)
    browser.open(page.as_uri())
    places = (
        "JSON.stringify([...document.querySelectorAll('h2, figure, .cards, .record, details')].map(e => e.offsetTop))"
    )
    before = browser.js(places)
    click(browser, "#shortcut")
    pick(browser, "gradient-activation", "pre")
    pick(browser, "gradient-activation", "post")
    click(browser, "#gradient-plot svg")
    click(browser, "#accuracy-curve svg")
    browser.js("document.getElementById('depth').focus()")
    browser.press("Home", "ArrowRight")
    assert browser.js(places) == before


@pytest.mark.parametrize("reduced", [False, True])
def test_motion(browser, page, reduced):
    browser.look(width=1280, reduced=reduced)
    browser.open(page.as_uri())
    assert browser.js("document.getAnimations().length") == 0
    browser.js("document.getElementById('shortcut').click()")
    assert (browser.js("document.getAnimations().length") == 0) is reduced


def test_records_that_lack_what_they_may(browser, tmp_path):
    """Only what explore insists on: the rest is said not to be recorded."""
    needed = ("kind", "depth", "step", "layers", "weight_grad_norm", "train_loss", "test_accuracy")
    bare = {
        name: {entries: [{k: v for k, v in e.items() if k in needed} for e in RECORDS[name][entries][:2]]}
        for name, entries in (("degradation", "runs"), ("gradients", "stacks"))
    }
    browser.open(write(tmp_path, bare).as_uri())
    text = browser.js("document.body.innerText")
    assert text.count("not recorded") > 15
    assert not re.search(r"undefined|NaN|null|\[object", text)
    browser.requests.clear()
