"""The loss that a training module defines inside its ``main``."""

from __future__ import annotations

import importlib.util
import re
import sys
import traceback
from functools import wraps
from pathlib import Path

import pytest
import torch

from tests.patch.scripts import inputs, later, plain, script
from vjepa_fast import ops
from vjepa_fast.errors import UserError
from vjepa_fast.patch import losses, vjepa2

HERE = Path(__file__).parent


def load(name):
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    found = importlib.util.module_from_spec(spec)
    sys.modules[name] = found
    spec.loader.exec_module(found)
    return found


@pytest.fixture
def module(monkeypatch):
    """The script and the one it takes its parts from, both anew."""
    for name in ("fair_style", "fair_nested"):
        monkeypatch.setitem(sys.modules, name, None)
    load("fair_style")
    return load("fair_nested")


@pytest.fixture
def calls(monkeypatch):
    """How often ops.latent_loss was called."""
    found, honest = [], ops.latent_loss
    monkeypatch.setattr(ops, "latent_loss", lambda *a, **k: found.append(a[1].shape) or honest(*a, **k))
    return found


@pytest.mark.parametrize("loss_exp", [1.0, 2.0])
def test_a_whole_run_stays_the_same(module, calls, loss_exp):
    args = dict(epochs=3, ipe=3, loss_exp=loss_exp)
    wanted, weights = module.main(args)
    before, asked = module.main, module.called.times
    said = vjepa2(module)
    assert [line.split(":")[0].split()[0] for line in said] == ["MaskCollator", "apply_masks", "loss_fn"]
    assert re.match(r"loss_fn in main, line \d+ is ops.latent_loss", said[2])
    got, mine = module.main(args)
    assert got == pytest.approx(wanted, abs=1e-6) and len(set(got)) == 9
    assert all(torch.allclose(a, b, rtol=0, atol=1e-6) for a, b in zip(mine, weights))
    # two groups of two masks, nine steps; the comparison asks both once more, and the original gathers then alone
    assert len(calls) == 4 * (9 + 1) and calls[0][1:] == (32, module.DIM)
    assert module.called.times - asked == 1
    assert module.main is before and module.main(args)[0] == got  # others' names for it are patched too


def test_the_loss_gathers_nothing(module, calls):
    gathered, honest = [], module.apply_masks
    module.apply_masks = lambda *args, **kwargs: gathered.append(args) or honest(*args, **kwargs)
    vjepa2(module)
    module.main(dict(ipe=4))
    assert len(gathered) == 1 and len(calls) == 36  # the comparison: of its two gathers the first is compared again


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients(p, dtype):
    module = script(plain())
    for seed in range(2):
        h, z, masks = inputs(dtype)
        flat = [x for zi in z for x in zi]
        original = getattr(module.main, "vjepa_fast_original", module.main)
        wanted = original(h, z, masks, p)
        slopes = torch.autograd.grad(wanted, flat)
        if not seed:
            vjepa2(module)
        got = module.main(h, z, masks, p)
        mine = torch.autograd.grad(got, flat)
        tolerance = 1e-6 if dtype == torch.float32 else 1e-2
        assert got.item() == pytest.approx(wanted.item(), abs=tolerance, rel=tolerance)
        for a, b in zip(mine, slopes):
            assert a.dtype == b.dtype and torch.allclose(a, b, rtol=0, atol=3 * tolerance * b.abs().max().item())


def test_bfloat16(module, calls):
    args = dict(dtype=torch.bfloat16)
    wanted, weights = module.main(args)
    vjepa2(module)
    got, mine = module.main(args)
    assert got == pytest.approx(wanted, rel=1e-2) and calls
    assert all(torch.allclose(a, b, atol=0.05) for a, b in zip(mine, weights))


def test_lines_stay_those_of_the_file(module):
    def stop():
        with pytest.raises(RuntimeError, match="stopped on purpose") as error:
            module.main({}, fail_at=(1, 0))
        return [(f.filename, f.lineno, f.line) for f in traceback.extract_tb(error.tb)[1:]]

    before = stop()
    vjepa2(module)
    assert stop() == before and len(before) == 2 and before[-1][2] == 'raise RuntimeError("stopped on purpose")'


def test_errors_in_the_loss_point_at_its_line(module, monkeypatch):
    vjepa2(module)

    def broken(*args, **kwargs):
        raise RuntimeError("broken")

    monkeypatch.setattr(ops, "latent_loss", broken)
    with pytest.raises(RuntimeError, match="broken") as error:
        module.main({})
    (frame,) = [f for f in traceback.extract_tb(error.tb) if f.name == "loss_fn"]
    assert frame.filename == module.__file__ and frame.line == "def loss_fn(z, h):"


def test_another_result_is_an_error(module, monkeypatch):
    honest = ops.latent_loss
    monkeypatch.setattr(ops, "latent_loss", lambda *args, **kwargs: honest(*args, **kwargs) * 1.001)
    vjepa2(module)
    for _ in range(2):  # an error that is caught is not the end of it
        with pytest.raises(UserError, match=r"fair_nested.main: loss_fn in main, line \d+: vjepa_fast computes some"):
            module.main({})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("(a - b.gather", "(a.detach() - b.gather"),
        ("(a - b.gather", "((a + a.detach()) / 2 - b.gather"),
        (".mean() / P", ".mean() / P * 1.0001"),
        ("/ len(values)", "/ 3"),
        ("/ len(values)", "/ len(values), 0"),
        ("a, m in zip(x, y)", "a, m in zip(x[:1], y)"),
    ],
)
def test_losses_that_are_others(change, words):
    module = script(plain().replace(*(x.replace("P", "loss_exp") for x in (change, words))))
    vjepa2(module)
    h, z, masks = inputs()
    with pytest.raises(UserError, match="computes something else|has other gradients"):
        module.main(h, z, masks, 2.0)


def test_a_target_with_gradient():
    module = script(plain())
    vjepa2(module)
    h, z, masks = inputs()
    h[1].requires_grad_()
    with pytest.raises(UserError, match="script.main: loss_fn in main, line 3: h wants a gradient"):
        module.main(h, z, masks, 1.0)


def test_what_does_not_fit_the_op():
    module = script(plain())
    vjepa2(module)
    h, z, masks = inputs()
    with pytest.raises(UserError, match="latent_loss: loss_exp: expected .*; leave it as it was"):
        module.main(h, z, masks, 0.5)


def test_other_names(calls):
    module = script("chosen, power = masks_pred, loss_exp\n" + plain("chosen", "power"))
    with pytest.raises(UserError, match="uses no variable masks_pred of the functions .* give it as masks="):
        vjepa2(module)
    with pytest.raises(UserError, match="uses no variable loss_exp of the functions .* give it as loss_exp"):
        vjepa2(module, masks="chosen")
    vjepa2(module, masks="chosen", loss_exp="power")
    h, z, masks = inputs()
    original = module.main.vjepa_fast_original(h, z, masks, 2.0)
    assert torch.allclose(module.main(h, z, masks, 2.0), original) and len(calls) == 8


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (plain().replace("(z, h)", "(z, h, a=1)"), "expected a function of .z, h. or "),
        (plain().replace("(z, h)", "(h, z)"), "expected a function of .z, h. or "),
        (plain().replace("(z, h)", "(z, h, *more)"), "expected a function of .z, h. or "),
        (plain().replace("(z, h)", "(z, h, *, a=1)"), "expected a function of .z, h. or "),
        ("async " + plain(), "expected a function of .z, h. or "),
        (plain().replace("return", "yield"), "expected a function of .z, h. or "),
        ("w = 2\n" + plain().replace("sum(values)", "w * sum(values)"), "uses w as well, so it is another loss"),
        (
            plain() + "\ndef other():\n    def loss_fn(z, h): return masks_pred * loss_exp",
            r"several functions are named loss_fn .loss_fn in main, line 3, loss_fn in main, line 10.; rename",
        ),
    ],
)
def test_losses_that_are_refused(body, words):
    module = script(body, apply_masks=lambda x, masks, concat=True: x)
    before = dict(vars(module)), module.main.__code__
    with pytest.raises(UserError, match=f"script.*{words}") as error:
        vjepa2(module)
    assert "\n" not in str(error.value)
    assert (dict(vars(module)), module.main.__code__) == before  # all or nothing
    vjepa2(module, loss=None)
    assert module.main.__code__ == before[1] and hasattr(module.apply_masks, "vjepa_fast_original")


def test_patched_twice(module):
    del module.MaskCollator, module.apply_masks
    vjepa2(module)
    with pytest.raises(UserError, match="fair_nested: main was patched already; call vjepa2 once"):
        vjepa2(module)


@pytest.mark.parametrize(
    "around",
    [
        "def step():\n{}\n    return loss_fn\nloss_fn = step()",
        "class Step:\n{}\nloss_fn = Step.loss_fn",
        "try:\n    str(h)\nfinally:\n{}",
        "async def step():\n{}\n    return loss_fn\ntry:\n    step().send(None)\nexcept StopIteration as end:\n"
        "    loss_fn = end.value",
        "loss_fn = None\nfor _ in range(2):\n    def step():\n        nonlocal loss_fn\n    {}\n    step()",
    ],
)
def test_wherever_it_is(around, calls):
    depth = "\n".join("    " + line for line in plain().splitlines())
    if "nonlocal" in around:
        depth = depth.replace("\n", "\n    ")
    module = script(around.format(depth))
    h, z, masks = inputs()
    wanted = module.main(h, z, masks, 2.0)
    vjepa2(module)
    assert torch.allclose(module.main(h, z, masks, 2.0), wanted) and len(calls) == 8


def test_a_compiled_loss(monkeypatch):
    traced, honest = [], ops.latent_loss

    def latent_loss(*args, **kwargs):
        traced.append(torch.compiler.is_compiling())
        return honest(*args, **kwargs)

    monkeypatch.setattr(ops, "latent_loss", latent_loss)
    torch._dynamo.reset()
    module = script("@compiled\n" + plain(), compiled=torch.compile(backend="eager"))
    original = script(plain())
    vjepa2(module)
    h, z, masks = inputs()
    for p in (1.0, 2.0):
        for shift in range(2):
            chosen = [[m.roll(shift, 1) for m in mi] for mi in masks]
            assert torch.allclose(module.main(h, z, chosen, p), original.main(h, z, chosen, p))
    # the graph ends before it: neither the comparison nor what was compared already is traced
    assert traced == [False] * 4 * (4 + 1)


def test_a_main_with_decorators_and_variables_of_its_own(calls):
    module = script(plain())
    factory = "def make(scale):\n    def main(h, z, masks_pred, loss_exp=2.0, *, more=0.0):\n        'Doc.'\n"
    factory += "".join(f"        {line}\n" for line in plain().splitlines())
    factory += "        return loss_fn(z, h) * scale + more\n    return main\nmain = kept(make(3.0))"

    def kept(function):
        return wraps(function)(lambda *args, **kwargs: function(*args, **kwargs))

    module.__dict__["kept"] = kept
    exec(factory, module.__dict__)
    del module.make
    h, z, masks = inputs()
    wanted = module.main(h, z, masks, more=1.0)
    vjepa2(module)
    assert torch.allclose(module.main(h, z, masks, more=1.0), wanted) and len(calls) == 8
    assert module.main.__doc__ == "Doc." and module.main.__wrapped__.__kwdefaults__ == {"more": 0.0}


def test_functions_of_other_modules_stay(calls):
    other = script(plain())
    module = script("loss_fn = None", borrowed=other.main, apply_masks=lambda x, masks, concat=True: x)
    said = vjepa2(module)
    assert said[-1] == "loss_fn: neither an attribute of the module nor defined inside its functions, so it stays"
    other.main(*inputs()[:2], inputs()[2], 1.0)
    assert not calls


def test_variables_that_are_not_set_yet():
    body = "if loss_exp > 1:\n    chosen = masks_pred\n" + plain("chosen")
    module = script(body)
    vjepa2(module, masks="chosen")
    h, z, masks = inputs()
    with pytest.raises(NameError, match="chosen"):
        module.main(h, z, masks, 1.0)
    assert torch.isfinite(module.main(h, z, masks, 2.0))


def test_mean_loss_without_gradient():
    h, z, masks = inputs()
    module = script(plain())
    vjepa2(module)
    with torch.inference_mode():
        h, z = [x.clone() for x in h], [[x.clone() for x in zi] for zi in z]
        got = module.main(h, z, masks, 2.0)
        assert torch.allclose(got, module.main.vjepa_fast_original(h, z, masks, 2.0))
        assert got == losses.mean_loss(z, h, masks, 2.0)


# -- V-JEPA 2.1 --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("p", [1.0, 2.0])
def test_class_tokens_and_weights(calls, monkeypatch, p):
    module, asked = later(), []
    h, z, masks = inputs()
    extra = [[torch.cat((x[:, :1] * 0.5, x), 1).detach().requires_grad_() for x in zi] for zi in z]
    distances = [[torch.rand(m.shape) + 0.5 for m in mi] for mi in masks]
    vjepa2(module)
    honest = losses.same_gradients
    monkeypatch.setattr(losses, "same_gradients", lambda *args: asked.append(args) or honest(*args))
    kinds = [(z, False, None), (z, False, distances), (extra, True, None), (extra, True, distances)]
    for z_, cls_loss, d_weights in kinds * 2:
        targets = [torch.cat((hi[:, :1] * 2, hi), 1) for hi in h] if cls_loss else h
        given = dict(cls_loss=cls_loss, d_weights=d_weights)
        flat = [x for zi in z_ for x in zi]
        wanted = module.main.vjepa_fast_original(p, z_, targets, masks, **given)
        got = module.main(p, z_, targets, masks, **given)
        assert torch.allclose(got, wanted, atol=1e-6)
        for a, b in zip(torch.autograd.grad(got, flat), torch.autograd.grad(wanted, flat)):
            assert torch.allclose(a, b, rtol=0, atol=1e-6)
    assert len(asked) == 3 and len(calls) == 4 * (6 + 2)  # of each kind once; weights do not count with a class token


def test_weights_are_compared_when_they_first_come():
    module = later("1.01")
    vjepa2(module)
    h, z, masks = inputs()
    assert module.main(1.0, z, h, masks, False, None) > 0
    with pytest.raises(UserError, match="computes something else"):
        module.main(1.0, z, h, masks, False, [[torch.ones(m.shape) for m in mi] for mi in masks])
