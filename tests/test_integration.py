"""What people do with a ResNet around its forward: copies, files, compilers, exports, detectors, parallel training."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import warnings

import parity
import pytest
import torch
import torch.distributed as dist
import torchvision
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.ops import FrozenBatchNorm2d

from fused_resnet import FusedBasicBlock, FusedBottleneck, models, swap_blocks, swap_report

BLOCKS = {"basic": BasicBlock, "bottleneck": Bottleneck}
FORMATS = {"contiguous": torch.preserve_format, "channels_last": torch.channels_last}


def network(block=Bottleneck, layers=(2, 1), device="cpu", train=False, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    model = parity.randomize_norms(parity.Short(block, layers, **kwargs), 0, branch=0.3).to(device)
    return parity.calibrate(model, image(device)).train(train)


def image(device="cpu", batch: int = 2, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, 3, 33, 33, generator=torch.Generator().manual_seed(seed)).to(device)


def pair(block=Bottleneck, format="channels_last", device="cpu", train=False, dtype=torch.float32, **kwargs):
    """(ours, theirs): the same network, swapped and untouched."""
    theirs = network(block, device=device, train=train, **kwargs).to(dtype)
    return swap_blocks(copy.deepcopy(theirs), memory_format=FORMATS[format]), theirs


def close(a, b, rtol=1e-4, atol=1e-4):
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def same(a: parity.Seen, b: parity.Seen, tolerance: float = 1e-8) -> None:
    assert a.keys() == b.keys()
    for key in b:
        torch.testing.assert_close(a[key], b[key], rtol=tolerance, atol=tolerance, msg=lambda m, key=key: f"{key}: {m}")


def buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: b.clone() for n, b in model.named_buffers()}


blocks = pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
formats = pytest.mark.parametrize("format", FORMATS)
modes = pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])


# --- copies and files -------------------------------------------------------------------------------------------------


def by_pickle(model):
    return pickle.loads(pickle.dumps(model))


def by_file(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@formats
@blocks
@pytest.mark.parametrize("copied", [copy.deepcopy, by_pickle, by_file, copy.copy], ids=lambda c: c.__name__)
def test_copies(copied, block, format, device):
    """A copy is fused, computes the same, and is independent; made after a forward, so that anything kept is in it."""
    ours, theirs = pair(block, format, device)
    x = image(device)
    expected = ours(x)
    other = copied(ours)
    assert [type(m) for m in other.modules()] == [type(m) for m in ours.modules()]
    assert len(swap_report(other).fused) == 3
    assert torch.equal(other(x), expected)
    if copied is not copy.copy:
        for p in other.parameters():
            p.data.mul_(1.1)
        assert torch.equal(ours(x), expected) and not torch.allclose(other(x), expected)
        assert [p.stride() for p in other.parameters()] == [p.stride() for p in ours.parameters()]
    same(parity.observe(ours.double().train(), x.double()), parity.observe(theirs.double().train(), x.double()))


def test_a_built_model_in_a_file(device):
    model = models.resnet18(num_classes=3).to(device).eval()
    assert torch.equal(by_file(model)(image(device)), model(image(device)))
    assert "fused_resnet" in str(type(by_file(model).layer1[0]))


# --- torch.compile and torch.export -----------------------------------------------------------------------------------


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@contextlib.contextmanager
def no_recompile():
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield


def with_each_block(names: str, usual, other):
    """Each block in the usual way; the other way goes with the slow tests."""
    cases = [
        (usual, "basic", []),
        (usual, "bottleneck", []),
        (other, "bottleneck", pytest.mark.slow),
        (other, "basic", pytest.mark.slow),
    ]
    return pytest.mark.parametrize(names, [pytest.param(v, BLOCKS[b], id=f"{v}-{b}", marks=m) for v, b, m in cases])


@with_each_block("format, block", "channels_last", "contiguous")
@modes
def test_compiles_whole_for_any_batch(block, train, format, device, fresh_dynamo):
    """fullgraph, and a second and third batch size without a recompile; gradients and running statistics included."""
    ours, theirs = pair(block, format, device, train, dtype=torch.float64)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")

    for batch in (3, 5, 4):
        x = image(device, batch).double()
        marked = x.clone().requires_grad_()
        torch._dynamo.mark_dynamic(marked, 0)
        for model in (ours, theirs):
            model.zero_grad(set_to_none=True)
        with no_recompile() if batch != 3 else contextlib.nullcontext():
            y = compiled(marked)
        cotangent = parity.cotangent_of(tuple(y.shape)).to(y)
        (y * cotangent).sum().backward()
        expected = parity.observe(theirs, x)
        seen = {"output": y.detach(), "grad input": marked.grad}
        seen |= {f"grad {n}": p.grad for n, p in ours.named_parameters()}
        same(seen | {f"buffer {n}": b for n, b in ours.named_buffers()}, expected)


@blocks
def test_compiles_without_grad(block, device, fresh_dynamo):
    ours, theirs = pair(block, device=device)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for batch in (3, 5):
            x = image(device, batch)
            torch._dynamo.mark_dynamic(x, 0)
            with no_recompile() if batch != 3 else contextlib.nullcontext():
                close(compiled(x), theirs(x))


def test_compiled_weights_are_not_frozen_in(device, fresh_dynamo):
    """An optimizer step and an EMA copy reach the compiled graph without a recompile."""
    ours, theirs = pair(device=device)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        close(compiled(image(device)), theirs(image(device)))
        for model in (ours, theirs):
            for t in (*model.parameters(), *model.buffers()):
                t.data.mul_(1.02) if t.is_floating_point() else None
        with no_recompile():
            close(compiled(image(device)), theirs(image(device)))


def test_compile_then_hook_then_compile(device, fresh_dynamo):
    """A hook that comes after compiling is called once dynamo is reset, which is what PyTorch asks for."""
    ours, theirs = pair(device=device)
    compiled = torch.compile(ours, backend="aot_eager")
    with torch.no_grad():
        close(compiled(image(device)), theirs(image(device)))
        for model in (ours, theirs):
            model.layer1[0].bn2.weight.data.mul_(1.5)
            model.layer1[0].conv2.register_forward_hook(lambda m, a, out: out * 2)
        torch._dynamo.reset()
        close(compiled(image(device)), theirs(image(device)))


@pytest.mark.parametrize(
    "train", [pytest.param(True, id="train", marks=pytest.mark.slow), pytest.param(False, id="eval")]
)
def test_compiles_with_inductor(train, device, fresh_dynamo):
    theirs = parity.randomize_norms(nn.Sequential(BasicBlock(4, 4), Bottleneck(4, 1)), 0).to(device).train(train)
    ours = swap_blocks(copy.deepcopy(theirs))
    compiled = torch.compile(ours, fullgraph=True)
    for batch in (3, 5):
        x = torch.randn(batch, 4, 7, 9, device=device)
        torch._dynamo.mark_dynamic(x, 0)
        with no_recompile() if batch != 3 else contextlib.nullcontext():
            y = compiled(x)
        close(y, theirs(x))
    for model in (ours, theirs):
        model.zero_grad(set_to_none=True)
    compiled(x).square().sum().backward()
    for p in theirs.parameters():
        p.grad = None
    theirs(x).square().sum().backward()
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-3, msg=name)


@with_each_block("way, block", "non_strict", "strict")
@modes
def test_exports(way, block, train, device, fresh_dynamo):
    """The exported program runs at another batch size, survives a file, and in training moves running statistics."""
    ours, theirs = pair(block, device=device, train=train)
    kept = buffers(ours)
    batch = torch.export.Dim("batch", min=2, max=16)
    program = torch.export.export(ours, (image(device, 3),), dynamic_shapes=({0: batch},), strict=way == "strict")
    same(buffers(ours), kept, 0)
    assert any("fused_resnet" in str(n.target) for n in program.graph.nodes)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    for exported in (program, torch.export.load(buffer)):
        module, expected = exported.module(), copy.deepcopy(theirs)
        for step in range(2):
            x = image(device, 5, seed=step)
            close(module(x), expected(x))
        a, b = buffers(module), buffers(expected)
        same(a, {n: b[n] for n in a}, 1e-4)  # strict export drops the buffers that nothing uses
        assert len(a) == len(b) or not train


@blocks
def test_traces(block, device):
    ours, theirs = pair(block, device=device)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(ours, image(device))
        close(traced(image(device, 5, seed=3)), theirs(image(device, 5, seed=3)))


# --- feature extraction -----------------------------------------------------------------------------------------------


@blocks
@modes
def test_feature_extractor(block, train, device):
    """Building one changes no buffer; its features are those of torchvision's blocks; it trains as the model does."""
    ours, theirs = pair(block, device=device, train=train)
    names = ["layer1.0", "layer1", "layer2.0", "avgpool"]
    kept = buffers(ours)
    extractor = create_feature_extractor(ours, names)
    same(buffers(ours), kept, 0)
    same(buffers(extractor), {n: b for n, b in kept.items()}, 0)
    reference = create_feature_extractor(theirs, names)
    for step in range(3):
        a, b = extractor(image(device, 3, seed=step)), reference(image(device, 3, seed=step))
        assert list(a) == list(b) == names
        for name in names:
            close(a[name], b[name])
    same(buffers(extractor), {n: b for n, b in buffers(reference).items()}, 1e-4)
    for mode in (True, False):  # the extractor holds both graphs
        extractor.train(mode)
        reference.train(mode)
        close(extractor(image(device, 3))["avgpool"], reference(image(device, 3))["avgpool"])


@pytest.mark.parametrize("train", [pytest.param(True, marks=pytest.mark.slow), False], ids=["train", "eval"])
def test_unusual_shortcut_in_tools(train, device, fresh_dynamo):
    """A downsample that is called as it is (ResNet-D's) goes through FX, dynamo and export as well."""
    ours, theirs = pair(device=device, train=train)
    for model in (ours, theirs):
        torch.manual_seed(4)
        project = [nn.AvgPool2d(2, 2, ceil_mode=True), nn.Conv2d(256, 512, 1, bias=False), nn.BatchNorm2d(512)]
        model.layer2[0].downsample = nn.Sequential(*project).to(device).train(train)
    x = image(device, 3)
    batch = torch.export.Dim("batch", min=2, max=16)
    program = torch.export.export(copy.deepcopy(ours), (image(device, 2),), dynamic_shapes=({0: batch},)).module()
    extractor = create_feature_extractor(copy.deepcopy(ours), {"fc": "logits"})
    compiled = torch.compile(copy.deepcopy(ours), fullgraph=True, backend="aot_eager")
    expected = theirs(x)
    for y in (program(x), extractor(x)["logits"], compiled(x)):
        close(y, expected)


@blocks
def test_extractor_trains_as_the_model(block, device):
    """N steps of the extractor equal N steps of the model, num_batches_tracked included."""
    model = swap_blocks(network(block, device=device, train=True)).double()
    extractor = create_feature_extractor(copy.deepcopy(model), {"fc": "logits"})
    updates = [torch.optim.SGD(m.parameters(), lr=1e-3, momentum=0.9) for m in (model, extractor)]
    for step in range(4):
        x = image(device, 3, seed=step).double()
        for update in updates:
            update.zero_grad()
        model(x).logsumexp(1).sum().backward()
        extractor(x)["logits"].logsumexp(1).sum().backward()
        for update in updates:
            update.step()
    a, b = extractor.state_dict(), model.state_dict()
    same({k: a[k] for k in b}, b, 1e-12)
    assert all(v == 4 for k, v in b.items() if k.endswith("num_batches_tracked"))


@blocks
@pytest.mark.parametrize("traced_in", ["train", "eval"])
def test_symbolic_trace_can_be_switched(block, traced_in, device):
    """torch.fx's own tracer keeps BNs as modules, so its graph follows train() and eval() as torchvision's does."""
    ours, theirs = pair(block, device=device)
    ours, theirs = (torch.fx.symbolic_trace(m.train(traced_in == "train")) for m in (ours, theirs))
    x = image(device)
    for mode in (True, False, True):
        torch.testing.assert_close(ours.train(mode)(x), theirs.train(mode)(x), rtol=1e-4, atol=1e-4)
    for name, buffer in theirs.named_buffers():
        torch.testing.assert_close(ours.get_buffer(name), buffer, rtol=1e-4, atol=1e-4, msg=name)


def test_node_names(device):
    ours, theirs = pair(device=device)
    for a, b in zip(get_graph_node_names(ours), get_graph_node_names(theirs), strict=True):
        stages = {n.split(".")[0] for n in b}
        assert {n.split(".")[0] for n in a} == stages


def test_intermediate_layer_getter(device):
    ours, theirs = pair(device=device)
    layers = {"layer1": "a", "layer2": "b"}
    a, b = (torchvision.models._utils.IntermediateLayerGetter(m, layers)(image(device)) for m in (ours, theirs))
    for key in b:
        close(a[key], b[key])


# --- precision --------------------------------------------------------------------------------------------------------


@formats
@modes
@blocks
def test_autocast_bfloat16(block, train, format, device):
    """Outputs and gradients by the rule, the yardstick being torchvision's under autocast; dtypes as there."""
    model = network(block, device=device, train=train)
    x = image(device)

    def look(m, x):
        with torch.autocast(device, dtype=torch.bfloat16, enabled=x.dtype is torch.float32):
            y = m(x)
        m.zero_grad(set_to_none=True)
        (y * parity.cotangent_of(tuple(y.shape)).to(y)).sum().backward()
        assert all(p.grad.dtype is p.dtype for p in m.parameters())
        dtypes.append(y.dtype)
        return {"output": y.detach()} | {f"grad {n}": p.grad.clone() for n, p in m.named_parameters()}

    dtypes: list[torch.dtype] = []
    judge = parity.judge_of(model, x, look)
    yardstick = parity.yardstick_of(model, x, judge, look)
    ours = swap_blocks(copy.deepcopy(model), memory_format=FORMATS[format])
    parity.check(parity.errors(look(ours, x), judge), yardstick, torch.bfloat16)
    assert set(dtypes[1:]) == {torch.bfloat16}


@modes
def test_autocast_dtypes_inside(train, device):
    """What leaves a block under autocast has torchvision's dtype, and the statistics stay float32."""
    ours, theirs = pair(device=device, train=train)
    for x in (image(device), image(device).bfloat16()):
        with torch.autocast(device, dtype=torch.bfloat16):
            a = create_outputs(ours, x)
            b = create_outputs(theirs, x)
        assert a == b
    assert {t.dtype for n, t in ours.named_buffers() if "running" in n} == {torch.float32}


def create_outputs(model, x):
    seen = []
    handles = [
        m.register_forward_hook(lambda m, a, out: seen.append(out.dtype))
        for m in model.modules()
        if isinstance(m, BasicBlock | Bottleneck)
    ]
    model(x)
    for h in handles:
        h.remove()
    return seen


@modes
def test_bfloat16_model(train, device):
    """model.bfloat16(), BN included, by the rule; the judge has the weights that were rounded."""
    model = network(device=device, train=train).bfloat16()
    x = image(device).bfloat16()
    judge = parity.judge_of(model, x)
    yardstick = parity.yardstick_of(model, x, judge)
    ours = swap_blocks(copy.deepcopy(model))
    parity.check(parity.errors(parity.observe(ours, x), judge), yardstick, torch.bfloat16)


# --- BN across processes and other wrappers ---------------------------------------------------------------------------


@blocks
def test_sync_batch_norm_conversion(block, device):
    """convert_sync_batchnorm before and after the swap; in one process it is BatchNorm2d."""
    theirs = network(block, device=device, train=True)
    after = nn.SyncBatchNorm.convert_sync_batchnorm(swap_blocks(copy.deepcopy(theirs)))
    before = swap_blocks(nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(theirs)))
    x = image(device).double()
    expected = parity.observe(theirs.double(), x)
    for ours in (after, before):
        assert len(swap_report(ours).fused) == 3 and type(ours.layer1[0].bn1) is nn.SyncBatchNorm
        same(parity.observe(ours.double(), x), expected)


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("options", [{}, {"gradient_as_bucket_view": True}, {"static_graph": True}], ids=str)
@blocks
def test_distributed_data_parallel(block, options, one_process):
    ours, theirs = pair(block, train=True, dtype=torch.float64)
    wrapped = nn.parallel.DistributedDataParallel(ours, **options)
    updates = [torch.optim.SGD(m.parameters(), lr=1e-3, momentum=0.9) for m in (wrapped, theirs)]
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "error", message=".*strides.*"
        )  # DDP warns of a gradient that is not laid out as its weight
        for step in range(3):
            x = image(seed=step).double()
            for model, update in zip((wrapped, theirs), updates, strict=True):
                update.zero_grad()
                model(x).logsumexp(1).sum().backward()
                update.step()
    same(dict(ours.state_dict()), dict(theirs.state_dict()))


@pytest.mark.parametrize("unit", ["model", "block", "convolution"])
def test_fully_sharded(unit, one_process):
    """FSDP2 by model, by block (whose class it changes), by convolution (where a fused block must fall back)."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    states = []
    for model in pair(format="contiguous", train=True, dtype=torch.float64):
        kind = {"model": (), "block": Bottleneck, "convolution": nn.Conv2d}[unit]
        for m in [m for m in model.modules() if isinstance(m, kind)]:
            fully_shard(m, mesh=mesh)
        fully_shard(model, mesh=mesh)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        for step in range(2):
            optimizer.zero_grad()
            model(image(seed=step).double()).logsumexp(1).sum().backward()
            optimizer.step()
        states.append({k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in model.state_dict().items()})
        if not states[1:]:
            reasons = {b.reason for b in swap_report(model).fused}
            assert len(swap_report(model).fused) == 3
            assert reasons == ({"runs unfused: conv1: FSDPConv2d is not Conv2d"} if unit == "convolution" else {""})
    same(*states)


def test_sync_batch_norm_inside_a_process_group(one_process):
    """In eval mode there is nothing to collect."""
    ours = nn.SyncBatchNorm.convert_sync_batchnorm(swap_blocks(network(train=True))).eval()
    theirs = network(train=True).eval()
    close(ours(image()), theirs(image()))


@modes
@blocks
def test_functional_call(block, train, device):
    """Parameters from outside: the op reads what the module has at the call."""
    ours, theirs = pair(block, device=device, train=train, dtype=torch.float64)
    x = image(device).double()
    values = {n: (p * 1.01).detach().requires_grad_() for n, p in theirs.named_parameters()}
    results = []
    for model in (ours, theirs):
        state = values | {n: b.clone() for n, b in model.named_buffers()}
        y = torch.func.functional_call(model, state, (x,))
        results.append((y, torch.autograd.grad(y.square().sum(), list(values.values()))))
    torch.testing.assert_close(results[0], results[1], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved_tensors", "reentrant"])
@blocks
def test_activation_checkpointing(block, reentrant, device):
    """The second forward counts twice in the running statistics, as it does in torchvision."""
    ours, theirs = pair(block, device=device, train=True, dtype=torch.float64)

    def run(model, x):
        x = model.maxpool(model.relu(model.bn1(model.conv1(x))))
        for layer in (model.layer1, model.layer2):
            for m in layer:
                x = checkpoint(m, x, use_reentrant=reentrant)
        return model.fc(model.avgpool(x).flatten(1))

    seen = []
    for model in (ours, theirs):
        x = image(device).double().requires_grad_()
        run(model, x).square().sum().backward()
        seen.append(
            {"grad input": x.grad}
            | {f"grad {n}": p.grad for n, p in model.named_parameters()}
            | {f"buffer {n}": b for n, b in model.named_buffers()}
        )
    if block is Bottleneck and not reentrant:
        # The second forward ends with the last tensor that it has to bring back: inside the op of conv3 and bn3, whose
        # statistics are followed behind it, where torchvision's bn3 has followed them already.
        last = [key for key in seen[0] if ".bn3.r" in key or ".bn3.num" in key]
        assert last and all(int(v) == 1 for v in (seen[0].pop(k) for k in last) if v.dim() == 0)
        for key in last:
            seen[1].pop(key)
    same(*seen)
    assert int(ours.layer1[0].bn1.num_batches_tracked) == int(theirs.layer1[0].bn1.num_batches_tracked)


def test_checkpoint_sequential(device):
    ours, theirs = pair(device=device, train=True, dtype=torch.float64)
    x = torch.randn(2, 64, 9, 9, dtype=torch.float64, device=device, requires_grad=True)
    a, b = (checkpoint_sequential(m.layer1, 2, x, use_reentrant=False) for m in (ours, theirs))
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(torch.autograd.grad(a.sum(), x), torch.autograd.grad(b.sum(), x))


def test_data_parallel_replicas(device):
    """nn.parallel.replicate makes modules whose parameters are plain tensors."""
    if device != "cuda":
        pytest.skip("replicate needs a CUDA device")
    ours, theirs = pair(device=device)
    replica = nn.parallel.replicate(ours, [0])[0]
    close(replica(image(device)), theirs(image(device)))


def test_inference_mode_then_training(device):
    """Nothing kept from inference mode may enter a graph."""
    ours, theirs = pair(device=device)
    with torch.inference_mode():
        for _ in range(3):
            close(ours(image(device)), theirs(image(device)))
    same(parity.observe(ours.double(), image(device).double()), parity.observe(theirs.double(), image(device).double()))
    with torch.inference_mode():
        inside = swap_blocks(copy.deepcopy(theirs).float())
        close(inside(image(device)), theirs.float()(image(device)))


def test_averaged_model(device):
    """swa_utils, with its EMA in place and its update_bn, on a swapped model."""
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

    results = []
    for model in pair(device=device, train=True, dtype=torch.float64):
        averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        for step in range(3):
            optimizer.zero_grad()
            model(image(device, seed=step).double()).logsumexp(1).sum().backward()
            optimizer.step()
            averaged.update_parameters(model)
            averaged.eval()(image(device).double())
        update_bn([image(device, seed=s).double() for s in range(3)], averaged)
        results.append(dict(averaged.state_dict()) | {"output": averaged.eval()(image(device).double())})
    same(*results)


def test_meta_device():
    """Shapes without memory: the fakes answer."""
    with torch.device("meta"):
        for train in (True, False):
            model = models.resnet50(num_classes=7).train(train)
            assert model(torch.empty(2, 3, 64, 64)).shape == (2, 7)


def test_threads(device):
    """Eval-mode forwards from several threads at once."""
    from concurrent.futures import ThreadPoolExecutor

    ours, theirs = pair(device=device)
    images = [image(device, seed=s) for s in range(6)]

    def run(x):
        with torch.no_grad():
            return ours(x)

    with torch.no_grad(), ThreadPoolExecutor(3) as pool:
        for a, x in zip(pool.map(run, images), images, strict=True):
            close(a, theirs(x))


# --- memory -----------------------------------------------------------------------------------------------------------


def saved_bytes(model: nn.Module, x: torch.Tensor) -> int:
    """What autograd keeps of a forward besides parameters and the input, each storage once."""
    kept: dict[int, int] = {}
    keep_alive = []

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        keep_alive.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        keep_alive.append(model(x))
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), x)}
    return sum(n for p, n in kept.items() if p not in known)


@modes
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_saves_no_more_than_torchvision(name, train, device):
    theirs = getattr(torchvision.models, name)(num_classes=10).to(device).train(train)
    ours = swap_blocks(copy.deepcopy(theirs))
    x = torch.randn(2, 3, 96, 96, device=device, requires_grad=True)
    allowed, used = saved_bytes(theirs, x), saved_bytes(ours, x)
    vectors = sum(4 * 4 * m.num_features for m in theirs.modules() if isinstance(m, nn.BatchNorm2d))
    assert used <= allowed + vectors
    if not train:
        assert used < 0.75 * allowed


# --- detection and segmentation ---------------------------------------------------------------------------------------


def detector() -> nn.Module:
    """As torchvision builds it for fine-tuning: a frozen norm with its eps, the last three stages trainable."""
    torch.manual_seed(0)
    model = torchvision.models.detection.fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=3, min_size=64, max_size=96, box_detections_per_img=5
    )
    # The backbone is what is looked at: a narrow head does.
    model.roi_heads.box_head = torchvision.models.detection.faster_rcnn.TwoMLPHead(256 * 7 * 7, 32)
    model.roi_heads.box_predictor = torchvision.models.detection.faster_rcnn.FastRCNNPredictor(32, 3)
    for name, m in list(model.backbone.body.named_modules()):
        if isinstance(m, nn.BatchNorm2d):
            frozen = FrozenBatchNorm2d(m.num_features, eps=0.0)
            parity.randomize_norms(m, len(name))
            frozen.load_state_dict(m.state_dict())
            parent = model.backbone.body.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], frozen)
    for name, p in model.backbone.body.named_parameters():
        p.requires_grad_(any(s in name for s in ("layer2", "layer3", "layer4")))
    for m in model.backbone.body.modules():
        if isinstance(m, Bottleneck):
            m.bn3.weight.mul_(0.3)
    return model


@pytest.fixture(scope="module")
def detectors():
    theirs = detector()
    return swap_blocks(copy.deepcopy(theirs)), theirs


def test_detection(detectors, device):
    """fasterrcnn_resnet50_fpn, FrozenBatchNorm2d: losses, all gradients, a step; then what it detects."""
    seen = []
    for model in detectors:
        model = copy.deepcopy(model).to(device).double().train()
        assert len(swap_report(model).fused) == (16 if model is not None and seen == [] else 0)
        torch.manual_seed(1)
        images = [torch.rand(3, 64, 80, dtype=torch.float64, device=device) for _ in range(2)]
        boxes = torch.tensor([[5.0, 8, 40, 50], [20, 10, 70, 60]], dtype=torch.float64, device=device)
        targets = [{"boxes": boxes, "labels": torch.tensor([1, 2], device=device)} for _ in images]
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        torch.manual_seed(2)
        losses = model(images, targets)
        sum(losses.values()).backward()
        optimizer.step()
        result = {f"loss {k}": v.detach() for k, v in losses.items()}
        result |= {f"grad {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
        result |= {f"stepped {k}": v for k, v in model.state_dict().items()}
        with torch.no_grad():
            found = model.eval()(images)
        result |= {f"found {i} {k}": v for i, f in enumerate(found) for k, v in f.items()}
        seen.append(result)
    same(*seen)
    assert any(k.startswith("grad backbone.body.layer2") for k in seen[0])
    assert not any(k.startswith("grad backbone.body.layer1") for k in seen[0])


@pytest.mark.parametrize("train", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["train", "eval"])
def test_segmentation(train, device):
    """deeplabv3_resnet50: dilated stages, whose first block has dilation 1 before it."""
    torch.manual_seed(0)
    theirs = torchvision.models.segmentation.deeplabv3_resnet50(
        weights=None, weights_backbone=None, num_classes=4, aux_loss=True
    )
    parity.randomize_norms(theirs, 0, branch=0.3).to(device)
    for m in theirs.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
    ours = swap_blocks(copy.deepcopy(theirs))
    assert len(swap_report(ours).fused) == 16
    assert {m.conv2.dilation for m in ours.modules() if isinstance(m, Bottleneck)} == {(1, 1), (2, 2), (4, 4)}
    x = torch.randn(2, 3, 33, 41, device=device).double()
    seen = []
    for model in (ours, theirs):
        model.double().train(train)
        out = model(x)
        sum((v * parity.cotangent_of(tuple(v.shape)).to(v)).sum() for v in out.values()).backward()
        seen.append(
            {f"output {k}": v.detach() for k, v in out.items()}
            | {f"grad {n}": p.grad for n, p in model.named_parameters()}
            | {f"buffer {n}": b for n, b in model.named_buffers()}
        )
    same(*seen, 1e-7)


def test_detection_backbone_built_on_fused_blocks(device):
    """ResNet(FusedBottleneck, ..., norm_layer=FrozenBatchNorm2d) is what resnet_fpn_backbone would wrap."""
    from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor

    results = []
    for block in (FusedBottleneck, Bottleneck):
        torch.manual_seed(0)
        body = ResNet(block, [1, 1, 1, 1], norm_layer=FrozenBatchNorm2d)
        body = parity.randomize_norms(body, 0, branch=0.3)
        backbone = _resnet_fpn_extractor(body, 3).to(device).double()
        features = backbone(image(device).double())
        sum(f.square().sum() for f in features.values()).backward()
        results.append(dict(features) | {n: p.grad for n, p in backbone.named_parameters() if p.grad is not None})
    same(*results)


@pytest.mark.parametrize("block, fused", [(BasicBlock, FusedBasicBlock), (Bottleneck, FusedBottleneck)])
def test_resnet_of_fused_blocks(block, fused, device):
    """The first of the README's ways: torchvision.models.ResNet(FusedBottleneck, ...), zero_init_residual included."""
    torch.manual_seed(0)
    ours = ResNet(fused, [1, 1, 1, 1], zero_init_residual=True)
    torch.manual_seed(0)
    theirs = ResNet(block, [1, 1, 1, 1], zero_init_residual=True)
    a, b = ours.state_dict(), theirs.state_dict()
    assert list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in b)
    x = image(device).double()
    same(*(parity.observe(m.to(device).double(), x) for m in (ours, theirs)))
