"""Which steps of real networks can be one kernel: by shapes alone, nothing is computed."""

from types import SimpleNamespace

import pytest
import torch
import torchvision
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.feature_extraction import create_feature_extractor

from fused_resnet.backends import cuda_conv
from fused_resnet.engine import cases, chain_cases, path
from fused_resnet.engine.eager import named
from fused_resnet.engine.gpu import Program
from fused_resnet.engine.graph import capture, propagate
from fused_resnet.engine.pieces import Pieces
from fused_resnet.engine.plan import describe
from fused_resnet.engine.steps import match
from fused_resnet.engine.tune import Results

H100 = (90, 132)
SHAPE = (8, 3, 224, 224)


@pytest.fixture(autouse=True)
def an_imagined_gpu(monkeypatch):
    for module in (cases, chain_cases):
        monkeypatch.setattr(module, "triton_unavailable", lambda: None)
        monkeypatch.setattr(module, "chip", lambda device: H100)


def pieces_of(model, shape=SHAPE, dtype=torch.float16, channels_last=False):
    format = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.empty(shape, dtype=dtype, device="meta").contiguous(memory_format=format)
    graph = capture(model)
    propagate(graph, (x.float(),))
    network = match(graph)
    return Pieces(network, dtype, torch.device("cuda"), False, named(network, (x,)))


def meta(name, **options):
    with torch.device("meta"):
        return torchvision.models.get_model(name, **options)


def way(pieces, cost=lambda piece: 1.0):
    return path.cheapest(len(pieces.network.steps), pieces.moves(cost))[1]


def layers(piece, pieces):
    """The blocks of the model in which a piece's steps lie, as 'layer1.0 layer1.1'."""
    graph = pieces.network.graph
    by_name = {n.name: n for n in graph.nodes}
    found = {}
    for step in piece.steps:
        for name in step.layers:
            if by_name[name].op == "call_module":
                found[".".join(str(by_name[name].target).removeprefix("body.").split(".")[:2])] = None
    return " ".join(found)


@pytest.mark.parametrize(
    ("name", "counts"), [("resnet50", (3, 4, 6, 3)), ("resnet101", (3, 4, 23, 3)), ("resnet152", (3, 8, 36, 3))]
)
def test_a_bottleneck_network_is_a_kernel_a_block(name, counts):
    pieces = pieces_of(meta(name))
    chosen = way(pieces)
    rungs = [p.rung for p in chosen]
    # Stem; the first reduce; then a kernel a block up to the first of layer4, whose 512 channels leave no room for the
    # next reduce; that is two a block in layer4; the last takes the average pool with it; fc.
    assert rungs == [2, 1] + [5] * sum(counts[:3]) + [4, 1] * (counts[3] - 1) + [4, 0]
    assert len(chosen[-2].steps) == 3 and chosen[-2].args.pool
    quarters = [layers(p, pieces) for p in chosen if p.quarter]
    assert quarters == [f"layer{i}.{counts[i - 1] - 1} layer{i + 1}.0" for i in (1, 2, 3)]
    readers = [layers(p, pieces) for p in chosen if p.quartered]
    assert [r.split()[0] for r in readers] == ["layer2.0", "layer3.0", "layer4.0"]
    for piece in chosen:
        if piece.quartered:
            _, h, w, stride = piece.args.segment
            assert stride == 1 and (h, w) == piece.args.size()


def test_a_classifier_is_in_tf32_only_where_matrix_products_are():
    """PyTorch lets convolutions use it unless told otherwise, and products if told so."""
    graph, x = capture(torchvision.models.resnet18(num_classes=8).eval()), torch.zeros(1, 3, 64, 64)
    propagate(graph, (x,))
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for precision, wanted in (("ieee", False), ("tf32", True)):
            matmul.fp32_precision = precision
            pieces = Pieces(match(graph), torch.float32, torch.device("cpu"), True, {"x": x}).all()
            args = [p.args for p in pieces if p.args is not None]
            assert [a.tf32 for a in args if isinstance(a, cases.LinearArgs)] == [wanted]
            assert all(a.tf32 for a in args if type(a) is cases.ConvArgs)
    finally:
        matmul.fp32_precision = before


def test_step_by_step_projections_are_second_segments():
    for name, convolutions in (("resnet18", 20), ("resnet50", 53)):
        pieces = pieces_of(meta(name))
        chosen = way(pieces, lambda piece: float(len(piece.steps) ** 2))
        projections = 3 if name == "resnet18" else 4
        rungs = [p.rung for p in chosen]
        assert rungs.count(3) == projections and rungs.count(2) == 1
        assert rungs.count(1) == convolutions - 1 - 2 * projections
        assert not any(p.quarter or p.quartered for p in chosen)
        assert [p.args.segment[3] for p in chosen if p.rung == 3] == [1, 2, 2, 2][-projections:]


def test_basic_blocks_have_no_chain():
    assert max(p.rung for p in pieces_of(meta("resnet34")).all()) == 3


def test_layer4_has_no_rung_5():
    pieces = pieces_of(meta("resnet50"))
    assert not [p for p in pieces.all() if p.rung == 5 and layers(p, pieces).startswith("layer4")]
    assert [p for p in pieces.all() if p.rung == 4 and layers(p, pieces).startswith("layer4")]


@pytest.mark.parametrize("name", ["resnext50_32x4d", "resnext101_64x4d"])
def test_groups_are_convolutions_of_the_first_rung(name):
    pieces = pieces_of(meta(name))
    assert max(p.rung for p in pieces.all()) == 3
    grouped = [p for p in pieces.all() if p.steps[0].conv is not None and p.steps[0].conv.groups > 1]
    assert len(grouped) == {"resnext50_32x4d": 16, "resnext101_64x4d": 33}[name]
    assert {(type(p.args), p.rung, p.args.groups) for p in grouped} == {
        (cases.GroupedArgs, 1, int(name.split("_")[1].split("x")[0]))
    }
    results = Results({p.key: SimpleNamespace(chosen=cases.CUDNN, seconds=None) for p in pieces.all() if p.args})
    program = SimpleNamespace(pieces=way(pieces), results=results, chosen=lambda piece: cases.CUDNN)
    steps = describe(pieces.network, torch.float16, Program.groups(program))
    assert not [s.why for s in steps if s.why]


def test_wide_networks_take_the_rungs_that_fit_them():
    """Twice the middle channels: 128, 256, 512, 1024."""
    pieces = pieces_of(meta("wide_resnet50_2"))
    rungs = {}
    for p in pieces.all():
        rungs.setdefault(layers(p, pieces).split(".")[0], set()).add(p.rung)
    assert rungs["layer1"] == {1, 3, 4, 5} and rungs["layer2"] == {1, 3, 4, 5}
    assert rungs["layer3"] == {1, 3, 4} and rungs["layer4"] == {1, 3}


def test_float32_has_no_chain():
    assert max(p.rung for p in pieces_of(meta("resnet50"), dtype=torch.float32).all()) == 3


def test_an_older_gpu_has_no_chain(monkeypatch):
    for module in (cases, chain_cases):
        monkeypatch.setattr(module, "chip", lambda device: (75, 40))
    pieces = pieces_of(meta("resnet50"))
    assert max(p.rung for p in pieces.all()) == 3
    assert all([c.backend for c in p.args.problem().build().candidates()] == ["cudnn"] for p in pieces.all() if p.args)


def test_without_triton_there_is_pytorch(monkeypatch):
    for module in (cases, chain_cases):
        monkeypatch.setattr(module, "triton_unavailable", lambda: "cannot import triton")
    pieces = pieces_of(meta("resnet50"))
    assert max(p.rung for p in pieces.all()) == 3
    left = {c.backend for p in pieces.all() if p.args for c in p.args.problem().build().candidates()}
    assert left == {"cudnn", "cuda"} if cuda_conv.instances() else left == {"cudnn"}


def stage_outputs():
    return create_feature_extractor(meta("resnet50"), [f"layer{i}" for i in (1, 2, 3, 4)])


def fpn_body():
    with torch.device("meta"):
        return resnet_fpn_backbone(backbone_name="resnet50", weights=None, trainable_layers=5)


def dilated_body():
    with torch.device("meta"):
        return torchvision.models.segmentation.deeplabv3_resnet50(weights=None, weights_backbone=None).backbone


@pytest.mark.parametrize("build", [stage_outputs, fpn_body, dilated_body], ids=["extractor", "fpn", "dilated"])
def test_who_else_reads_a_stage_gets_all_of_it(build):
    pieces = pieces_of(build(), shape=(2, 3, 160, 224))
    quarters = [layers(p, pieces) for p in pieces.all() if p.quarter]
    # DeepLab reads layer4 alone; its layers 3 and 4 have dilation in place of strides.
    assert quarters == (["layer1.2 layer2.0"] if build is dilated_body else [])
    assert bool([p for p in pieces.all() if p.quartered]) == bool(quarters)
    chosen = way(pieces)
    assert any(p.rung == 5 for p in chosen)
    assert not any(getattr(p.args, "pool", False) for p in chosen)


def test_one_stage_that_is_read_keeps_the_others_quartered():
    pieces = pieces_of(create_feature_extractor(meta("resnet50"), ["layer2", "fc"]))
    assert [layers(p, pieces).split()[0] for p in way(pieces) if p.quarter] == ["layer1.2", "layer3.5"]


def test_a_value_that_is_an_output_is_not_lost_inside_a_chain():
    model = create_feature_extractor(meta("resnet50"), {"layer1.0.relu": "a", "layer3.1.conv3": "b", "fc": "c"})
    pieces = pieces_of(model)
    for chosen in (way(pieces), way(pieces, lambda p: float(len(p.steps)))):
        made = {s.output for p in chosen for s in p.steps}
        seen = {name for p in chosen for name in (p.y, p.z)}
        assert pieces.network.outputs <= made and pieces.network.outputs <= seen


@pytest.mark.parametrize("shape", [(1, 3, 97, 161), (2, 3, 33, 65), (1, 3, 32, 32)], ids=str)
def test_odd_sizes_quarter_to_what_the_projection_reads(shape):
    pieces = pieces_of(meta("resnet50"), shape=shape)
    chosen = way(pieces)
    whole = {p.y: p.args.size() for p in chosen if p.quarter}
    read = {pieces.network.source(p.steps[1].segment[0]): p.args.segment[1:3] for p in chosen if p.quartered}
    assert whole.keys() == read.keys() and len(whole) == 3
    assert all(read[name] == ((h + 1) // 2, (w + 1) // 2) for name, (h, w) in whole.items())


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_the_stem_reads_the_input_as_it_comes(channels_last):
    pieces = pieces_of(meta("resnet18"), dtype=torch.bfloat16, channels_last=channels_last)
    (stem,) = pieces.at(0)
    assert stem.args.channels_last == channels_last and stem.args.input_dtype == "bfloat16"


def test_another_stem_is_pytorchs():
    model = meta("resnet18")
    with torch.device("meta"):
        model.conv1 = torch.nn.Conv2d(4, 64, 7, 2, 3, bias=False)
    (stem,) = pieces_of(model, shape=(2, 4, 64, 64)).at(0)
    assert stem.args is None


def test_unsolved_problems_leave_a_way():
    """Whatever is dropped, every step is computed once, by PyTorch's operators in the last resort."""
    pieces = pieces_of(meta("resnet50"))
    solved = {p.key for p in pieces.all() if p.rung == 5}  # each step alone is not
    pieces.keep(solved)
    chosen = way(pieces)
    assert [s for p in chosen for s in p.steps] == pieces.network.steps
    assert {p.rung for p in chosen if p.args} == {5}
    assert sum(p.quarter for p in chosen) == sum(p.quartered for p in chosen)


def test_problems_have_different_keys_where_they_differ():
    known = {}
    for name in ("resnet18", "resnet50", "wide_resnet50_2"):
        for p in pieces_of(meta(name)).all():
            if p.args is not None:
                assert known.setdefault(p.key, p.args) == p.args
