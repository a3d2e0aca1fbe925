"""The dispatch: which backend runs, for whom a choice holds, and what is said when a backend cannot run."""

import contextvars
import threading

import pytest
import torch

from vjepa_fast import ops
from vjepa_fast.errors import UserError
from vjepa_fast.objectives.rows import SQUARE
from vjepa_fast.ops import _backend, _cpp

ENC, PRED, GRID = torch.tensor([[0, 3]]), torch.tensor([[1]]), (1, 2, 2)


@pytest.fixture
def toy(monkeypatch):
    """An op whose backends tell their name; cpp refuses negative arguments."""
    monkeypatch.setattr(_backend, "_implementations", {})
    _backend.register("toy", "eager")(lambda x: "eager")
    _backend.register("toy", "cpp", lambda *args: ["no negatives"] if args and args[0] < 0 else [])(lambda x: "cpp")
    return lambda x: _backend.call("toy", x)


def test_auto_takes_the_fastest_that_can_run(toy, monkeypatch):
    monkeypatch.delenv("VJEPA_FAST_BACKEND", raising=False)
    assert toy(1) == "cpp"
    assert toy(-1) == "eager"


def test_forced_backend_is_used_or_refused_with_every_reason(toy):
    with ops.use_backend("eager"):
        assert toy(1) == "eager"
    with ops.use_backend("cpp"):
        assert toy(1) == "cpp"
        with pytest.raises(ops.BackendError, match="toy cannot run on backend 'cpp'.*no negatives"):
            toy(-1)
    with ops.use_backend("triton"), pytest.raises(ops.BackendError, match="toy has no triton implementation"):
        toy(1)


def test_use_backend_nests_and_restores(toy, monkeypatch):
    monkeypatch.setenv("VJEPA_FAST_BACKEND", "eager")
    assert toy(1) == "eager"
    with ops.use_backend("cpp"):
        with ops.use_backend("auto"):
            assert ops.current_backend() == "auto"
        assert ops.current_backend() == "cpp"
    assert ops.current_backend() == "eager"


def test_use_backend_as_a_function_holds_for_the_rest_of_its_context(toy):
    def chosen_and_used():
        ops.use_backend("eager")
        return toy(1)

    outside = ops.current_backend()
    assert contextvars.copy_context().run(chosen_and_used) == "eager"
    assert ops.current_backend() == outside


def test_threads_do_not_see_each_others_choice(toy, monkeypatch):
    """They enter and leave in the order a, b, a, b: restoring what was there before would leave b's choice behind."""
    monkeypatch.delenv("VJEPA_FAST_BACKEND", raising=False)
    entered, left, seen = threading.Event(), threading.Event(), {}

    def a():
        with ops.use_backend("eager"):
            assert entered.wait(30)
            seen["a inside"] = toy(1)
        seen["a after"] = ops.current_backend()
        left.set()

    def b():
        seen["b before"] = ops.current_backend()
        with ops.use_backend("cpp"):
            entered.set()
            assert left.wait(30)
            seen["b inside"] = toy(1)
        seen["b after"] = ops.current_backend()

    first = threading.Thread(target=a)
    first.start()
    second = threading.Thread(target=b)
    second.start()
    first.join()
    second.join()
    assert seen == {"a inside": "eager", "a after": "auto", "b before": "auto", "b inside": "cpp", "b after": "auto"}
    assert ops.current_backend() == "auto"


@pytest.mark.skipif(not _cpp.LOADED, reason=_cpp.REASON or "-")
@pytest.mark.parametrize("forward", ["eager", "cpp"])
@pytest.mark.parametrize("op", ["target_norm", "rope3d", "latent_loss"])
def test_backward_runs_where_the_forward_ran(monkeypatch, forward, op):
    """Whatever is in force when the gradient is asked for, and in whichever thread: a GPU's backward has its own."""
    used = []

    def spied(name, backend, fn, objections):
        return lambda *args: (used.append(backend), fn(*args))[1], objections

    spies = {
        name: {backend: spied(name, backend, *entry) for backend, entry in row.items()}
        for name, row in _backend._implementations.items()
    }
    monkeypatch.setattr(_backend, "_implementations", spies)
    with ops.use_backend(forward):
        x = torch.randn(1, 2, 12, requires_grad=True)
        if op == "target_norm":
            out = ops.target_norm(x, 2)
        elif op == "rope3d":
            out = ops.rope3d(x, torch.randn(2, 2, 4), 1)
        else:
            out = ops.latent_loss_token(x, torch.randn(1, 4, 12), torch.tensor([[0, 3]]), SQUARE(2.0))
    other = "cpp" if forward == "eager" else "eager"
    with ops.use_backend(other):
        (grad,) = torch.autograd.grad(out.sum(), x, retain_graph=True)
    elsewhere = threading.Thread(target=lambda: out.sum().backward())
    elsewhere.start()
    elsewhere.join()
    assert torch.equal(x.grad, grad)
    assert used == [forward] * 3


def test_unknown_names_are_refused(monkeypatch):
    with pytest.raises(UserError, match="use_backend: expected one of auto, triton, cpp, eager, got 'cuda'"):
        ops.use_backend("cuda")
    monkeypatch.setenv("VJEPA_FAST_BACKEND", "fast")
    with pytest.raises(UserError, match="VJEPA_FAST_BACKEND: expected .* got 'fast'"):
        ops.mask_distance(ENC, PRED, GRID)


def test_environment_variable_reaches_real_ops(monkeypatch):
    monkeypatch.setenv("VJEPA_FAST_BACKEND", "triton")
    with pytest.raises(ops.BackendError, match="target_norm cannot run on backend 'triton'.*float64 is left to eager"):
        ops.target_norm(torch.ones(1, 4).double(), 2)


def test_report_names_every_op_and_backend():
    report = ops.backend_report()
    assert {"mask_distance", "patch_mean", "rope3d", "target_norm", "tubelet_patchify"} <= set(report)
    assert all(set(row) == {"triton", "cpp", "eager"} and row["eager"] == "" for row in report.values())
    assert (report["mask_distance"]["cpp"] == "") == _cpp.LOADED


def test_report_names_backends_that_an_op_lacks(toy):
    assert ops.backend_report() == {"toy": {"triton": "toy has no triton implementation", "cpp": "", "eager": ""}}


def test_missing_or_broken_library_is_a_reason_not_a_crash(tmp_path, monkeypatch):
    assert "was not built" in _cpp._load(tmp_path / "_C.so")
    (tmp_path / "_C.so").write_bytes(b"no library")
    reason = _cpp._load(tmp_path / "_C.so")
    assert "does not load" in reason and "\n" not in reason
    monkeypatch.setattr(_cpp, "LOADED", False)
    monkeypatch.setattr(_cpp, "REASON", reason)
    assert ops.mask_distance(ENC, PRED, GRID).tolist() == [[1.0, 1.0]]  # in eager code
    assert "not in use, eager PyTorch runs instead: vjepa_fast/_C.so does not load" in _cpp.status()
    with ops.use_backend("cpp"), pytest.raises(ops.BackendError, match="does not load"):
        ops.mask_distance(ENC, PRED, GRID)


def test_second_copy_of_the_library_is_refused_and_the_first_keeps_working(tmp_path):
    if not _cpp.LOADED:
        pytest.skip(_cpp.REASON)
    copy = tmp_path / "_C.so"
    copy.write_bytes(_cpp.PATH.read_bytes())
    assert "another copy is loaded" in _cpp._load(copy)
    with ops.use_backend("cpp"):
        assert ops.mask_distance(ENC, PRED, GRID).tolist() == [[1.0, 1.0]]
