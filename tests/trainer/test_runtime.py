"""How the step is run: weights kept in the computing dtype, compiled regions, CUDA graphs (with a stand-in capture)."""

import contextlib
import logging
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.utils import counters

from vjepa_fast.errors import ConfigError
from vjepa_fast.models import LowCopy
from vjepa_fast.trainer import graphs, optim, regional
from vjepa_fast.trainer.step import TrainStep

from .conftest import batch, config

CUDA = torch.device("cuda")


# -- the target's weights in bfloat16 ----------------------------------------------------------------------------------
def autocast_target(step, clip):
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        return step.target_encoder(clip)


@pytest.mark.parametrize("model", [{}, {"use_silu": True}, {"use_rope": False}, {"rope_variant": "v2", "levels": 1}])
def test_low_copy_gives_the_bits_of_autocast(model):
    step = TrainStep(config(model=model, objectives={"pred": {}}), dtype=torch.bfloat16)
    for i, frames in enumerate((4, 1)):
        modality = "video" if frames == 4 else "image"
        step(batch(i, frames=(frames,), modality=modality), i)  # the weights are no longer those at the start
        clip = batch(7, frames=(frames,)).groups[0].clip
        want = autocast_target(step, clip)
        assert torch.equal(step._target(clip, 0), want) and want.dtype == torch.bfloat16


def test_low_copy_holds_matrices_and_their_biases_and_shares_the_rest():
    step = TrainStep(config(), dtype=torch.bfloat16)
    full, low = (dict(m.named_parameters()) for m in (step.target_encoder, step.low.copy))
    assert full.keys() == low.keys()
    halved = {k for k, p in low.items() if p.dtype == torch.bfloat16}
    assert {k for k, p in low.items() if p is not full[k]} == halved
    layers = ("patch_embed.proj", "patch_embed_img.proj", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert halved == {k for k in full if k.rsplit(".", 1)[0].endswith(layers)}
    assert {p.dtype for p in step.target_encoder.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in step.low.low)
    addresses = [p.data_ptr() for p in step.low.low]
    step.average.follow(0.5)
    assert addresses == [p.data_ptr() for p in step.low.low]  # a captured graph reads them there


def test_low_copy_follows_a_loaded_checkpoint_and_is_not_saved():
    a, b = (TrainStep(config(), dtype=torch.bfloat16) for _ in range(2))
    a(batch(), 0)
    saved = a.state_dict()
    assert {v.dtype for v in saved["target_encoder"].values()} == {torch.float32}
    b.load_state_dict(saved)
    clip = batch(1).groups[0].clip
    assert torch.equal(b._target(clip, 0), autocast_target(a, clip))


def test_the_moving_average_takes_the_low_copy_along():
    source, target = (torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3)) for _ in range(2))
    low = LowCopy(target, torch.bfloat16)
    before = [p.clone() for p in low.low]
    optim.Average(source, target, low).follow(0.5)
    assert not any(torch.equal(a, b) for a, b in zip(low.low, before))
    assert all(torch.equal(a, b.bfloat16()) for a, b in zip(low.low, low.full))
    assert all(a is b for a, b in zip(low.full, target[0].parameters(), strict=True))


def test_low_copy_needs_no_cast_of_a_weight():
    """Under autocast every use of a float32 matrix casts it; of the copy none does."""
    step = TrainStep(config(), dtype=torch.bfloat16)
    shapes = {tuple(p.shape) for p in step.low.full if p.ndim > 1}

    class Casts(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._to_copy.default and tuple(args[0].shape) in shapes:
                self.seen += 1
            return func(*args, **(kwargs or {}))

    counts = []
    for run in (step._target_forward, lambda clip: autocast_target(step, clip)):
        with Casts() as casts:
            casts.seen = 0
            run(batch().groups[0].clip)
        counts.append(casts.seen)
    assert counts[0] == 0 and counts[1] >= 4 * 4  # four matrices in each of four blocks


@pytest.mark.parametrize(
    ("cfg", "dtype"), [(config(), torch.float32), (config(target={"mode": "online"}), torch.bfloat16)]
)
def test_no_copy_where_there_is_nothing_to_cast_or_no_average(cfg, dtype):
    step = TrainStep(cfg, dtype=dtype)
    assert step.low is None and step.target is step.target_encoder
    assert isinstance(LowCopy(step.encoder, torch.bfloat16).copy, type(step.encoder))


# -- torch.compile -----------------------------------------------------------------------------------------------------
def test_what_compile_means(monkeypatch, caplog):
    def resolved(device, **runtime):
        return regional.resolve(config(runtime=runtime), torch.device(device))

    assert [resolved("cpu", compile=c) for c in ("auto", True, False, "blocks", "target")] == [
        "off",
        "whole",
        "off",
        "blocks",
        "target",
    ]
    monkeypatch.setattr(regional, "objections", lambda cfg: [])
    assert resolved("cuda") == "blocks"
    with pytest.raises(ConfigError, match="runtime.compile: unknown value 'yes'; accepted: true, false, auto"):
        resolved("cpu", compile="yes")
    monkeypatch.undo()
    with caplog.at_level(logging.WARNING, "vjepa_fast"):
        assert resolved("cuda", attention="varlen") == "off"
    assert "runtime.compile: auto leaves it off: " in caplog.text and "varlen" in caplog.text
    monkeypatch.setattr(regional.shutil, "which", lambda name: None)
    monkeypatch.delenv("CC", raising=False)
    assert any("C compiler" in reason for reason in regional.objections(config()))


SMALL = {"depth": 2, "levels": 2, "pred_depth": 2}  # two blocks of each kind


def compiled(how, monkeypatch, dtype=torch.float32):
    """A step whose regions are compiled by aot_eager: traced, guarded and differentiated as by inductor."""
    torch._dynamo.reset()
    counters.clear()
    compile_models = regional.compile_models
    monkeypatch.setattr(
        regional, "compile_models", lambda *args, **kwargs: compile_models(*args, **kwargs, backend="aot_eager")
    )
    return TrainStep(config(runtime={"compile": how}, model=SMALL), dtype=dtype)


@pytest.fixture
def clean_dynamo():
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(("how", "dtype", "kinds"), [("blocks", torch.bfloat16, 3), ("target", torch.float32, 1)])
def test_one_compilation_serves_all_blocks_of_a_kind_and_all_lengths(monkeypatch, clean_dynamo, how, dtype, kinds):
    step = compiled(how, monkeypatch, dtype)
    plain = TrainStep(config(model=SMALL), dtype=dtype)
    lengths, graphs_made = set(), []
    for i in range(6):
        mine, other = step(batch(i), i), plain(batch(i), i)
        torch.testing.assert_close(mine.loss, other.loss, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=0)
        lengths.add(tuple(m.shape[1] for m in step.sampler(batch(i).groups[0].clip, step=i, first_sample=0)[0]))
        graphs_made.append(counters["stats"]["unique_graphs"])
    assert len(lengths) >= 3  # else the test shows nothing
    assert graphs_made == [kinds] * 6 and not counters["graph_break"]


def test_names_and_state_do_not_change_when_compiled(monkeypatch, clean_dynamo):
    step, plain = compiled("blocks", monkeypatch), TrainStep(config(model=SMALL))
    assert list(step.encoder.state_dict()) == list(plain.encoder.state_dict())
    plain.load_state_dict(step.state_dict())


def test_what_is_compiled(monkeypatch):
    """``whole`` compiles the models as they are, and a target that is the encoder is not compiled twice."""
    asked = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **kwargs: asked.append((module, kwargs["dynamic"])))

    def of(cfg):
        asked.clear()
        step = TrainStep(cfg)
        blocks = [list(m.blocks) for m in (step.encoder, step.target)], list(step.predictor.predictor_blocks)
        return step, blocks

    step, _ = of(config(runtime={"compile": True}))
    assert asked == [(step.encoder, True), (step.predictor, True), (step.target_encoder, True)]
    step, _ = of(config(runtime={"compile": True}, target={"mode": "online"}))
    assert asked == [(step.encoder, True), (step.predictor, True)]
    step, ((encoder, target), predictor) = of(config(runtime={"compile": "blocks"}))
    assert asked == [(b, True) for b in encoder + predictor] + [(b, False) for b in target]
    step, ((_, target), _) = of(config(runtime={"compile": "target"}, data={"dataset_fpcs": (4, 8)}))
    assert asked == [(b, True) for b in target]  # clips of two lengths: symbolic
    step, ((encoder, _), predictor) = of(config(runtime={"compile": "blocks"}, target={"mode": "online"}))
    assert asked == [(b, True) for b in encoder + predictor]


# -- CUDA graphs -------------------------------------------------------------------------------------------------------
def imitated(run, device, pool):
    """As a CUDA graph behaves: fixed output, and only `replay` computes."""
    output = run().zero_()
    return output, lambda: output.copy_(run())


def graphed(**sections):
    step = TrainStep(config(**sections))
    step.capture(None, target=True)
    step.target_graphs.capture = imitated
    return step


def test_a_replayed_target_gives_the_same_steps():
    step, plain = graphed(), TrainStep(config())
    for i in range(4):
        assert torch.equal(step(batch(i), i).loss, plain(batch(i), i).loss)  # the average moves between the replays
    assert len(step.target_graphs.captured) == 1
    first = step.forward(batch(4), 4).h[0]
    kept = first.clone()
    assert step.forward(batch(5), 5).h[0] is first and not torch.equal(first, kept)  # as documented


def test_accumulation_and_groups_read_their_own_target():
    sections = {"optimization": {"accumulate": 2}, "data": {"dataset_fpcs": (4, 8)}}
    step, plain = graphed(**sections), TrainStep(config(**sections))
    for i in range(3):
        micro = [batch(2 * i, frames=(4, 8)), batch(2 * i + 1, frames=(4, 8), first=6)]
        assert torch.equal(step(micro, i).loss, plain(micro, i).loss)
    for i in (3, 4):
        twins = batch(9, frames=(4, 4))  # one shape twice in a batch: both outputs are read together
        assert torch.equal(step(twins, i).loss, plain(twins, i).loss)
    assert len(step.target_graphs.captured) == 3


def test_the_target_alone_where_that_is_asked_for():
    with pytest.raises(ConfigError, match="target, but it needs CUDA, the run is on cpu"):
        TrainStep(config(runtime={"cuda_graphs": "target"}))
    with pytest.raises(ConfigError, match="true, but it needs CUDA, the run is on cpu"):
        TrainStep(config(runtime={"cuda_graphs": True}))


class Cuda:
    """Writes down the order of a capture, and behaves as torch.cuda.graph does when its end fails."""

    def __init__(self, log, fails):
        self.log, self.fails, self.running = log, fails, "main"

    def device(self, device):
        return contextlib.nullcontext()

    def current_stream(self):
        return SimpleNamespace(name="main", wait_stream=lambda s: self.log.append(f"main waits for {s.name}"))

    def CUDAGraph(self):  # noqa: N802
        return SimpleNamespace(replay=lambda: self.log.append("replay"))

    @contextlib.contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        assert capture_error_mode == "thread_local" and pool == "pool" and stream.name == "side"
        self.running = "capture"
        yield
        if self.fails:
            raise RuntimeError("capture was invalidated")
        self.running = "main"

    def set_stream(self, stream):
        self.running = stream.name


@pytest.mark.parametrize("fails", [False, True])
def test_order_of_a_capture(monkeypatch, fails):
    log = []
    cuda = Cuda(log, fails)
    side = SimpleNamespace(name="side", wait_stream=lambda s: log.append(f"side waits for {s.name}"))
    monkeypatch.setattr(graphs.torch, "cuda", cuda)
    monkeypatch.setitem(graphs._streams, CUDA, side)

    def run():
        log.append(f"run on {cuda.running}")
        return 5

    if fails:
        with pytest.raises(RuntimeError, match="invalidated"):
            graphs._capture_cuda(run, CUDA, "pool")
        assert log == ["side waits for main", "run on capture"]
    else:
        result, replay = graphs._capture_cuda(run, CUDA, "pool")
        replay()
        assert result == 5 and log == ["side waits for main", "run on capture", "main waits for side", "replay"]
    assert cuda.running == "main"  # also after a failure, or the step would go on on the wrong stream


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the real capture needs a GPU")
@pytest.mark.parametrize("how", [False, "blocks"])
def test_real_capture(how):
    runtime = {"device": "cuda", "compile": how, "cuda_graphs": "target", "capacity_quantum": 0}
    step = TrainStep(config(runtime=runtime), device=CUDA, dtype=torch.bfloat16)
    for i in range(4):
        clip = batch(i).groups[0].clip.to(CUDA)
        got, want = step._target(clip, 0), step._target_forward(clip)
        assert torch.equal(got, want)
        assert torch.isfinite(step(batch(i), i).loss)
    assert len(step.target_graphs.captured) == 1
