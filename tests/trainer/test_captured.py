"""Captured steps, with a stand-in for the capture that freezes what a CUDA graph would freeze (recorder.py)."""

import copy
import dataclasses
import logging

import pytest
import torch

from vjepa_fast import ops
from vjepa_fast.config import list_recipes, load
from vjepa_fast.errors import ConfigError
from vjepa_fast.layers import fused_block
from vjepa_fast.layers.block import Block
from vjepa_fast.ops import _capture
from vjepa_fast.trainer import captured, graphs
from vjepa_fast.trainer.step import TrainStep

from .conftest import batch, config
from .recorder import capture
from .test_packed import EVERY_TERM

QUANTUM = {"capacity_quantum": 96}
OPTIMIZATION = {"epochs": 3, "ipe": 4, "lr": 1e-3, "warmup": 0.5, "weight_decay": 0.1, "final_weight_decay": 0.4}


# its weight changes from step to step
CHANGING = {**EVERY_TERM, "context": {"coeff": 0.5, "warmup": [1, 9]}}


def make(form=None, **sections):
    """A step with graphs of this form, or without; both read their numbers from the device."""
    step = TrainStep(config(runtime=QUANTUM, **sections))
    step.capture((form or Never)(step))
    step.captured.graphs.capture = capture
    return step


class Never(captured.Part):
    """Sees each key for the first time for ever."""

    def __init__(self, step):
        super().__init__(step)
        self.graphs.find = lambda key, run: None


def run(step, steps, data):
    """[loss, *terms, norm] of each step."""
    outs = [step(data(i), i) for i in range(steps)]
    return [torch.stack([out.loss, *out.terms.values(), out.grad_norm]) for out in outs]


def same(ours, theirs):
    """Every weight, average and count."""
    for a, b in zip(
        (ours.encoder, ours.predictor, ours.plan, ours.target_encoder),
        (theirs.encoder, theirs.predictor, theirs.plan, theirs.target_encoder),
    ):
        assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    assert list(ours.optimizer.counts.values()) == list(theirs.optimizer.counts.values())


def image_or_video(i):
    return batch(i % 3, frames=(1,), modality="image") if i % 2 else batch(i % 3)


IMAGES = {"pred": {}, "context": {"coeff": 0.5, "coeff_img": 0.1, "warmup": [0, 0]}}
CASES = {
    "every term": ({"objectives": CHANGING}, lambda i: batch(i % 3, frames=(8,))),
    "published": ({"objectives": CHANGING, "compat": "published"}, lambda i: batch(i % 3, frames=(8,))),
    "clipping": ({"optimization": {"clip_grad": 0.1}}, lambda i: batch(i % 3)),
    "online": ({"target": {"mode": "online"}, "objectives": {"pred": {}, "kinematic": {}}}, lambda i: batch(i % 3)),
    "untruncated": ({"masks": {"truncate": "none"}}, lambda i: batch(i % 3)),
    "two lengths": ({"data": {"dataset_fpcs": (4, 8)}}, lambda i: batch(i % 3, frames=(4, 8))),
    "images and videos": ({"objectives": IMAGES}, image_or_video),
    "recomputed activations": ({"model": {"use_activation_checkpointing": True}}, lambda i: batch(i % 3)),
}


@pytest.mark.parametrize("case", CASES)
def test_replayed_steps_are_the_steps(case):
    """Bit for bit: losses, norms and weights, over steps whose schedules all change."""
    sections, data = CASES[case]
    sections = {**sections, "optimization": {**OPTIMIZATION, **sections.get("optimization", {})}}
    plain, ours = make(**sections), make(captured.Whole, **sections)
    with ops.use_backend("eager"):
        steps = 10 if case in ("every term", "two lengths") else 7
        theirs, mine = run(plain, steps, data), run(ours, steps, data)
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    same(ours, plain)
    graphs = ours.captured.graphs  # each step but the first of its kind is a replay, the second that of a new graph
    assert steps > graphs.replays > len(graphs.captured) >= 1


def recipes():
    """A recipe for each set of terms, targets and masks that the recipes have; coefficients are but numbers."""
    found = {}
    for name in list_recipes():
        cfg = load(name)
        fields = {term: {k: v for k, v in of.items() if isinstance(v, str)} for term, of in cfg.objectives.items()}
        guided = any(spec.motion_guided for spec in cfg.masks.specs)
        found.setdefault(repr((fields, cfg.target.mode, cfg.target.stop_gradient, guided, cfg.compat)), name)
    return list(found.values())


@pytest.mark.parametrize("recipe", recipes())
def test_every_recipe_is_captured(recipe):
    """Nothing in its step reads the device, and what is replayed is the step."""
    cfg = load(recipe)
    sections = {"objectives": cfg.objectives, "target": dataclasses.asdict(cfg.target), "compat": cfg.compat}
    specs = [dataclasses.replace(spec, temporal_scale=(1.0, 1.0)) for spec in cfg.masks.specs]
    masks = {"specs": tuple(specs), "truncate": cfg.masks.truncate}
    plain, ours = (make(form, masks=masks, **sections) for form in (None, captured.Whole))
    data = ours.stage(batch(0, frames=(8,)), 0)
    with ops.use_backend("eager"):
        theirs, mine = (run(step, 2, lambda i: data) for step in (plain, ours))
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert len(ours.captured.graphs.captured) == 1


def test_one_graph_whatever_the_schedules_say():
    made = []

    def counted(run, device, pool):
        made.append(run)
        return capture(run, device, pool)

    step = make(captured.Whole, optimization=OPTIMIZATION, objectives={"pred": {}, "context": {"warmup": [1, 9]}})
    step.captured.graphs.capture = counted
    outs = [step(batch(0), i) for i in range(2)]  # masks are those of the step: draws of its first are used for all
    masks = step.stage(batch(0), 0)
    outs = [step(dataclasses.replace(masks, step=i), i) for i in range(8)]
    (graph,) = step.captured.graphs.captured.values()
    replays, inner = [], graph.replay
    graph.replay = lambda: replays.append(1) or inner()
    outs += [step(masks, i) for i in range(8, 12)]
    assert len(made) == 1 and len(replays) == 4
    for name in ("lr", "weight_decay", "momentum"):
        assert len({getattr(out, name) for out in outs}) > 8
    assert len({out.weights["context"] for out in outs}) > 6


def test_against_the_numbers_of_the_host():
    """Weights of terms, AdamW and average from the device are those of the host, but for the order of its formula."""
    sections = {"optimization": {**OPTIMIZATION, "eps": 1e-3}, "objectives": {**CHANGING, "sigreg": {"coeff": 0.0}}}
    host, ours = TrainStep(config(runtime=QUANTUM, **sections)), make(captured.Whole, **sections)
    theirs, mine = (run(step, 3, lambda i: batch(0, frames=(8,))) for step in (host, ours))
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    for a, b in zip(ours.params, host.params):  # a wrong rate or decay moves all; rounding, here and there one
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        assert int((~torch.isclose(a, b, rtol=1e-4, atol=1e-5)).sum()) <= max(1, a.numel() // 1000)


def micro(i):
    return [batch(2 * (i % 2)), batch(1 + 2 * (i % 2), first=3)]


@pytest.mark.parametrize("images", [False, True])
def test_accumulated_batches(images):
    """Graphs of forward and backward add to gradients that stay in place; who gets none stays without."""

    def data(i):
        return [batch(i % 2), batch(i % 2, frames=(1,), modality="image", first=3)] if images and i > 2 else micro(i)

    sections = {"optimization": {**OPTIMIZATION, "accumulate": 2, "clip_grad": 0.1}}
    plain, ours = make(**sections), make(captured.Part, **sections)
    with ops.use_backend("eager"):
        theirs, mine = run(plain, 9, data), run(ours, 9, data)
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    same(ours, plain)
    assert ours.captured.graphs.captured
    assert any(p.grad is None for p in ours.params) != images or images


def test_with_the_blocks_of_a_gpu(monkeypatch):
    """By the eager code of their ops."""
    monkeypatch.setattr(fused_block, "supports", lambda *_: True)
    monkeypatch.setattr(Block, "forward", None)  # nobody calls it
    plain, ours = make(), make(captured.Whole)
    with ops.use_backend("eager"):
        theirs, mine = (run(step, 5, lambda i: batch(i % 2)) for step in (plain, ours))
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True)) and ours.captured.graphs.captured
    same(ours, plain)


def test_what_a_step_reports_is_its_own():
    """A later replay does not overwrite what an earlier one gave; work and samples are counted as without graphs."""
    plain, ours = make(), make(captured.Whole)
    outs = [(ours(batch(i % 2), i), plain(batch(i % 2), i)) for i in range(6)]
    for mine, other in outs:
        assert torch.allclose(mine.loss, other.loss, rtol=1e-5) and mine.weights == other.weights
        assert (mine.work, mine.clips, mine.paths) == (other.work, other.clips, other.paths)
    assert len({float(mine.loss) for mine, _ in outs}) == 6


def test_monitors_are_computed_outside():
    step = make(captured.Whole)
    for i in range(4):
        step(batch(0), i)
    before = dict(step.captured.graphs.captured)
    out = step(batch(0), 4, monitor=True)
    assert "rankme" in out.monitors and step.captured.graphs.captured == before


def test_parameters_whose_counts_part_get_a_new_graph():
    """A graph that was made while two groups of parameters had made as many steps is wrong once they have not."""
    sections = {"objectives": IMAGES, "optimization": OPTIMIZATION}
    plain, ours = make(**sections), make(captured.Whole, **sections)

    def data(i):
        return image_or_video(1) if i == 5 else batch(0)

    with ops.use_backend("eager"):
        theirs, mine = run(plain, 10, data), run(ours, 10, data)
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    same(ours, plain)


def test_masks_that_do_not_fit_are_refused_as_ever(monkeypatch):
    step = make(captured.Whole)
    staged = [step.stage(batch(0), 0) for _ in range(4)]
    for i in range(3):
        step(staged[i], i)
    staged[3].masks[0].lengths[0, 1, 2] = 0
    with pytest.raises(ConfigError, match="no context"):
        step(staged[3], 3)


# -- what cannot be captured -------------------------------------------------------------------------------------------
def look(step, steps=4):
    return [step(batch(0), i) for i in range(steps)]


def test_a_term_that_reads_the_device_ends_the_use_of_graphs(monkeypatch, caplog):
    step = make(captured.Whole)
    term = type(step.plan.terms["pred"])
    inner = term.value

    def value(self, state, head, ctx):
        found = inner(self, state, head, ctx)
        return found if float(found) > 0 else -found

    monkeypatch.setattr(term, "value", value)
    plain = make()
    with caplog.at_level(logging.WARNING, "vjepa_fast"), ops.use_backend("eager"):
        theirs, mine = run(plain, 6, lambda i: batch(i % 2)), run(step, 6, lambda i: batch(i % 2))
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    same(step, plain)
    assert step.captured.graphs.off and caplog.text.count("auto leaves it off: the step could not be captured") == 1
    assert "not permitted when stream is capturing" in caplog.text
    forced = make(lambda step: captured.Whole(step, forced=True))
    with pytest.raises(ConfigError, match="cuda_graphs: true, but the step could not be captured"):
        look(forced)


def test_a_term_that_computes_with_the_step_is_not_captured(monkeypatch, caplog):
    """A graph would keep the number of the step that was captured."""
    step, plain = make(captured.Whole), make()
    term = type(step.plan.terms["pred"])
    inner = term.value
    monkeypatch.setattr(term, "value", lambda self, state, *more: inner(self, state, *more) * (1 + state.step))
    with caplog.at_level(logging.WARNING, "vjepa_fast"), ops.use_backend("eager"):
        theirs, mine = run(plain, 5, lambda i: batch(0)), run(step, 5, lambda i: batch(0))
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert step.captured.graphs.off and "computes with the step or epoch" in caplog.text
    assert not step.captured.inputs  # their memory is free


def test_a_loaded_state_gets_graphs_of_its_own():
    """Its moments are other tensors than those that the graphs before write to."""
    step, plain = make(captured.Whole), make()
    with ops.use_backend("eager"):
        for each in (step, plain):
            run(each, 4, lambda i: batch(0))
            each.load_state_dict(copy.deepcopy(each.state_dict()))
        assert not step.captured.graphs.captured
        theirs, mine = run(plain, 4, lambda i: batch(0)), run(step, 4, lambda i: batch(0))
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True)) and step.captured.graphs.captured
    same(step, plain)


def test_memory_that_runs_out_beside_the_graphs(monkeypatch, caplog):
    step, plain = make(captured.Whole), make()
    failed = []
    inner = TrainStep.losses

    def losses(self, data, index, *args):
        if self is step and index == 4 and not failed:  # a first occurrence, run beside the graphs
            failed.append(index)
            raise torch.OutOfMemoryError("out of memory")
        return inner(self, data, index, *args)

    monkeypatch.setattr(TrainStep, "losses", losses)

    def data(i):
        return batch(0, size=2) if i == 4 else batch(0)

    with caplog.at_level(logging.WARNING, "vjepa_fast"), ops.use_backend("eager"):
        theirs, mine = run(plain, 6, data), run(step, 6, data)
    assert failed and all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    same(step, plain)
    assert "needs more memory than is left beside its graphs" in caplog.text and not step.captured.graphs.captured


@dataclasses.dataclass(frozen=True)
class Waits:
    uncapturable: str = "it sorts on the host"


def test_choice_and_reasons(monkeypatch, caplog):
    cuda, cpu = torch.device("cuda"), torch.device("cpu")

    def chosen(device=cuda, quantum=None, target_grad=False, terms=None, **runtime):
        plan = TrainStep(config()).plan
        plan.terms = {**plan.terms, **(terms or {})}
        return captured.choose(config(runtime=runtime), device, quantum=quantum, target_grad=target_grad, plan=plan)

    assert chosen() == ("step", []) and chosen(cuda_graphs=True).how == "step"
    assert chosen(cuda_graphs=False).how == "off" and chosen(cuda_graphs="target").how == "target"
    assert chosen(cpu).how == "off" and chosen(quantum=0).how == "target"
    assert chosen(quantum=0, target_grad=True).how == "off" and chosen(target_grad=True).how == "step"
    assert chosen(terms={"mine": Waits()}) == ("target", ["objectives.mine: it sorts on the host"])
    with pytest.raises(ConfigError, match="true, but it needs CUDA.*lengths of masks are exact"):
        chosen(cpu, quantum=0, cuda_graphs=True)
    with pytest.raises(ConfigError, match="target, but the target takes part"):
        chosen(target_grad=True, cuda_graphs="target")
    monkeypatch.setenv("VJEPA_FAST_DEBUG", "1")
    with pytest.raises(ConfigError, match="VJEPA_FAST_DEBUG"):
        chosen(cuda_graphs=True)


def test_which_form(monkeypatch):
    choice = captured.Choice("step", [])

    def form(**sections):
        step = TrainStep(config(**sections))
        return type(captured.build(step, step.cfg, choice))

    assert form() is captured.Whole
    assert form(optimization={"accumulate": 2}) is captured.Part
    assert form(optimization={"name": "muon"}) is captured.Part
    assert captured.build(TrainStep(config()), config(), captured.Choice("target", [])) is None


# -- graphs ------------------------------------------------------------------------------------------------------------
def plain_capture(run, device, pool):
    return run(), lambda: None


def test_the_one_not_used_for_longest_goes(caplog):
    made = graphs.Graphs("it", torch.device("cpu"), capture=plain_capture)
    for _ in range(2):
        for n in range(graphs.MOST):
            made.find(n, lambda: 0)
    made.find(0, lambda: 0)
    for _ in range(2):
        made.find("new", lambda: 0)
    assert len(made.captured) == graphs.MOST and 0 in made.captured and 1 not in {*made.captured, *made.seen}
    assert caplog.text.count("come by turns") == 1


def test_tables_of_a_capture_are_filled_when_it_has_ended():
    table = torch.arange(3)

    def run():
        found = _capture.constant(table, torch.device("cpu"))
        assert found is not table  # its place, without content
        found.zero_()
        return found

    made = graphs.Graphs("it", torch.device("cpu"), capture=plain_capture)
    assert made.find("key", run) is None
    assert torch.equal(made.find("key", run).result, table)
    assert _capture.constant(table, torch.device("cpu")) is table  # outside of a capture


def test_room_for_tables_grows_until_it_is_enough():
    """Of the memory for tables that is set aside before a capture: the step is captured again with more."""
    tables = [torch.arange(n, dtype=torch.float64) for n in (_capture.ROOM // 8 - 5, 3, _capture.ROOM // 16)]
    made = graphs.Graphs("it", torch.device("cpu"), capture=plain_capture)
    for _ in range(2):
        found = made.find("key", lambda: [_capture.constant(x, torch.device("cpu")) for x in tables])
    assert all(torch.equal(a, b) for a, b in zip(found.result, tables, strict=True))
    assert made.room == 4 * _capture.ROOM


def test_too_many_tables_are_a_reason(monkeypatch, caplog):
    monkeypatch.setattr(graphs, "MOST_ROOM", _capture.ROOM)
    made = graphs.Graphs("it", torch.device("cpu"), capture=plain_capture)
    for _ in range(2):
        assert made.find("key", lambda: _capture.constant(torch.zeros(_capture.ROOM), torch.device("cpu"))) is None
    assert made.off and "over 1 MiB" in caplog.text


def test_the_first_error_of_a_capture_is_the_reason(caplog):
    """As on CUDA, where the end of a capture that failed raises an error of its own."""

    def capture(run, device, pool):
        try:
            run()
        finally:
            raise RuntimeError("failed due to a previous error during capture")

    def run():
        raise ValueError("what went wrong\nand where")

    made = graphs.Graphs("it", torch.device("cpu"), capture=capture)
    for _ in range(2):
        assert made.find("key", run) is None
    assert made.off and "(what went wrong)" in caplog.text


def test_no_event_is_waited_for_in_a_capture():
    """Lengths that are on the host are not asked for again: waiting for an event breaks a capture."""

    class Event:
        def synchronize(self):
            assert not _capture.capturing(torch.device("cpu"))

    step = make(captured.Whole)
    for i in range(3):
        staged = step.stage(batch(0), 0)
        for masks in staged.masks:
            masks.copied = Event()
        step(staged, i)
    assert step.captured.graphs.captured
