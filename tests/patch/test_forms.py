"""Which of a module's losses are replaced, which are left, and which are refused."""

from __future__ import annotations

import functools
import inspect
import operator
import re
import sys
import traceback
from types import ModuleType

import pytest
import torch

from tests.patch.scripts import inputs, later, plain, script
from vjepa_fast import ops
from vjepa_fast.errors import UserError
from vjepa_fast.patch import vjepa2

TOP = """def loss_fn(z, h, masks_pred, loss_exp=2.0):
    'Says what it is.'
    values = [
        (a - b.gather(1, m[..., None].expand(-1, -1, b.shape[-1]))).abs().pow(loss_exp).mean() / loss_exp
        for x, b, y in zip(z, h, masks_pred) for a, m in zip(x, y)
    ]
    return sum(values) / len(values)
"""


def module_of(text, **names):
    """A module without a file, of this text."""
    found = ModuleType("script")
    found.__dict__.update(names)
    exec(compile(text, "<no file>", "exec"), found.__dict__)
    return found


@pytest.fixture
def calls(monkeypatch):
    """How often ops.latent_loss was called."""
    found, honest = [], ops.latent_loss
    monkeypatch.setattr(ops, "latent_loss", lambda *a, **k: found.append(a[1].shape) or honest(*a, **k))
    return found


# -- variables that may change -----------------------------------------------------------------------------------------
SCALED = plain().replace("sum(values)", "SCALE * sum(values)")


@pytest.mark.parametrize(
    ("body", "name"),
    [
        (SCALED, "SCALE"),
        (plain().replace("sum(values)", "sum(v * SCALE for v in values)"), "SCALE"),  # in code inside
        (plain().replace("sum(values)", "scale() * sum(values)"), "SCALE"),  # in a function that it calls
        (plain().replace("sum(values)", "LATER * sum(values)"), "LATER"),  # not there yet
        (plain().replace("sum(values)", "kept[0] * sum(values)"), "kept"),
        (plain().replace("    return", "    global kept\n    kept = values\n    return"), "kept"),
        ("global LAST\nLAST = None\n" + plain().replace("sum(values)", "(LAST or 1) * sum(values)"), "LAST"),
    ],
)
def test_globals_that_may_change(body, name):
    module = script(body, SCALE=1.0, kept=[1.0])
    exec("def scale(): return SCALE", module.__dict__)
    before = dict(vars(module)), module.main.__code__
    with pytest.raises(UserError, match=f"loss_fn in main, line .*: uses {name} as well, so it is another loss; use"):
        vjepa2(module)
    assert (dict(vars(module)), module.main.__code__) == before


def test_globals_that_stay(calls):
    body = plain().replace("sum(values) / len(values)", "same(torch.stack(Made(values).SCALE).mean())")

    class Made(list):
        SCALE = property(list)

    module = script(body, torch=torch, Made=Made, SCALE=1.0)
    exec("def same(x): return abs(x)", module.__dict__)
    h, z, masks = inputs()
    wanted = module.main(h, z, masks, 2.0)
    vjepa2(module)  # an attribute of the name of a variable is another thing
    assert torch.allclose(module.main(h, z, masks, 2.0), wanted) and len(calls) == 8


@pytest.mark.parametrize("top", [("loss_exp",), ("masks_pred",), ("loss_exp", "masks_pred")])
def test_masks_and_exponent_of_the_module(calls, top):
    text = f"def main(h, z, masks, p):\n    global {', '.join(top)}\n    masks_pred, loss_exp = masks, p\n"
    text += "".join(f"    {line}\n" for line in plain().splitlines()) + "    return loss_fn(z, h)\n"
    module = module_of(text)
    h, z, masks = inputs()
    vjepa2(module)
    for p in (1.0, 2.0):
        assert torch.allclose(module.main(h, z, masks, p), module.main.vjepa_fast_original(h, z, masks, p))
    assert len(calls) == 4 * 3


def test_an_exponent_that_another_function_reads():
    """It is not that of the functions around the loss."""
    module = script(plain().replace("sum(values)", "scale() * sum(values)"), loss_exp=1.0)
    exec("def scale(): return loss_exp", module.__dict__)
    with pytest.raises(UserError, match="uses loss_exp as well"):
        vjepa2(module)


class Scaled:
    def __call__(self, z, h, masks_pred, loss_exp):
        return 0


def closed(scale):
    names = {"scale": scale}
    text = TOP.replace("sum(values)", "scale() * sum(values)" if callable(scale) else "scale * sum(values)")
    exec("def make(scale):\n" + "".join(f"    {x}\n" for x in text.splitlines()) + "    return loss_fn", names)
    return names["make"](scale)


@pytest.mark.parametrize(
    ("loss_fn", "words"),
    [
        (module_of(TOP.replace("sum(values)", "SCALE * sum(values)"), SCALE=1.0).loss_fn, "uses SCALE as well"),
        (closed(1.0), "uses scale as well"),
        (module_of(TOP.replace("loss_exp", "scale")).loss_fn, "expected a function of .z, h, masks_pred, loss_exp."),
        (module_of(TOP.replace("loss_exp=2.0", "*, loss_exp")).loss_fn, "expected a function of"),
        (functools.partial(module_of(TOP).loss_fn, loss_exp=1.0), "expected a function of"),
        (operator.attrgetter("a"), "expected a function of"),
        (Scaled(), "expected a function of"),  # whose attributes may change
        (torch.relu, "expected a function of"),
    ],
)
def test_losses_of_the_module_that_are_refused(loss_fn, words):
    module = module_of("", loss_fn=loss_fn, apply_masks=lambda x, masks, concat=True: x)
    with pytest.raises(UserError, match=f"script: loss_fn: {words}"):
        vjepa2(module)
    assert not hasattr(module.apply_masks, "vjepa_fast_original")
    vjepa2(module, loss=None)


def test_a_loss_of_the_module(calls):
    for original in (module_of(TOP).loss_fn, closed(lambda: 1.0)):
        module = module_of("", loss_fn=original)
        vjepa2(module)
        h, z, masks = inputs()
        wanted = original(z, h, masks)  # the exponent is that of its defaults
        assert torch.allclose(module.loss_fn(z, h, masks), wanted) and not torch.allclose(
            original(z, h, masks, 1.0), wanted
        )
        assert torch.allclose(module.loss_fn(z=z, h=h, masks_pred=masks, loss_exp=1.0), original(z, h, masks, 1.0))
        assert module.loss_fn.__name__ == "loss_fn" and module.loss_fn.__doc__ == "Says what it is."
        assert inspect.signature(module.loss_fn) == inspect.signature(original)
    assert len(calls) == 2 * (2 + 1) * 4  # the first is compared


def test_other_names_of_the_module(calls):
    module = module_of(TOP.replace("masks_pred", "chosen").replace("loss_exp", "power"))
    vjepa2(module, masks="chosen", loss_exp="power")
    h, z, masks = inputs()
    module.loss_fn(z, h, masks)
    assert len(calls) == 8


# -- several of one name -----------------------------------------------------------------------------------------------
EVALUATE = """
def evaluate(logits, labels):
    def loss_fn(logits, labels):
        return (logits - labels).square().mean()
    return loss_fn(logits, labels)
"""
STAYS = r"loss_fn in evaluate, line \d+: expected a function of \(z, h\) or \(z, h, .*\); it stays"


def test_another_loss_beside_that_of_the_module(calls):
    module = module_of(TOP + EVALUATE)
    code = module.evaluate.__code__
    said = vjepa2(module)
    assert len(said) == 4 and said[0].startswith("loss_fn is ops.latent_loss")
    assert re.fullmatch(STAYS, said[-1])
    h, z, masks = inputs()
    module.loss_fn(z, h, masks)
    assert len(calls) == 8 and module.evaluate.__code__ is code
    assert module.evaluate(torch.ones(2), torch.zeros(2)) == 1


def test_another_loss_beside_one_inside(calls):
    module = script(plain())
    exec(EVALUATE, module.__dict__)
    said = vjepa2(module)
    assert said[0].startswith("loss_fn in main, line 3 is ops.latent_loss") and "in evaluate" in said[-1]
    h, z, masks = inputs()
    module.main(h, z, masks, 1.0)
    assert len(calls) == 8 and module.evaluate(torch.ones(2), torch.zeros(2)) == 1


def test_another_loss_of_the_module_beside_one_inside(calls):
    module = script(plain(), loss_fn=lambda logits, labels: 7)
    said = vjepa2(module)
    assert said[-1] == "loss_fn: expected a function of (z, h, masks_pred, loss_exp); it stays"
    h, z, masks = inputs()
    module.main(h, z, masks, 1.0)
    assert len(calls) == 8 and module.loss_fn(1, 2) == 7


def test_several_of_which_none_is_known():
    module = script("def loss_fn(a): return 0", loss_fn=lambda logits, labels: 7)
    with pytest.raises(UserError, match=r"script: loss_fn: exp.*; loss_fn in main, line 3: exp.*; use") as error:
        vjepa2(module)
    assert "\n" not in str(error.value)


FACTORY = "def make(scale):\n    def main(h, z, masks_pred, loss_exp=2.0, *, more=0.0):\n"
FACTORY += "".join(f"        {line}\n" for line in plain().splitlines())
FACTORY += "        return loss_fn(z, h) * scale + more\n    return main\nmain, other = make(3.0), make(1.0)\n"


def test_a_factory_that_stays(calls):
    module = module_of(FACTORY)
    said = vjepa2(module)
    assert said[0].startswith("loss_fn in main, line 3 is ops.latent_loss")
    h, z, masks = inputs()
    original = module.main.vjepa_fast_original
    assert torch.allclose(original(h, z, masks), 3 * module.other.vjepa_fast_original(h, z, masks))
    assert torch.allclose(original(h, z, masks, 1.0, more=1.0), 1 + original(h, z, masks, 1.0))
    assert not calls
    for function in (module.main, module.other, module.make(3.0)):
        wanted = original(h, z, masks) / (3 if function is module.other else 1)
        assert torch.allclose(function(h, z, masks), wanted)
    assert len(calls) == 4 * 4  # all of them are compared as one


# -- names -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("names", [dict(loss="<lambda>"), dict(loss="a b"), dict(masks="class"), dict(loss_exp="")])
def test_what_is_no_name(names):
    module = script("f = lambda z, h: masks_pred * loss_exp\n" + plain(), apply_masks=lambda x, masks, concat=True: x)
    before = dict(vars(module)), module.main.__code__
    with pytest.raises(UserError, match=f"{[*names][0]}: expected the name of a variable, got"):
        vjepa2(module, **names)
    assert (dict(vars(module)), module.main.__code__) == before


@pytest.mark.parametrize("name", ["outer", "_vjepa_fast_outer"])
def test_any_name(calls, name):
    module = script(plain().replace("loss_fn", name) + f"\nloss_fn = {name}")
    vjepa2(module, loss=name)
    h, z, masks = inputs()
    module.main(h, z, masks, 1.0)
    assert len(calls) == 8


def test_the_stand_in_has_the_name_of_the_original():
    module = script(plain() + "\nglobal INNER\nINNER = loss_fn")
    h, z, masks = inputs()
    module.main(h, z, masks, 1.0)
    before = module.INNER
    vjepa2(module)
    module.main(h, z, masks, 1.0)
    assert module.INNER.__code__ != before.__code__
    assert module.INNER.__qualname__ == before.__qualname__ == "main.<locals>.loss_fn"
    if sys.version_info >= (3, 11):
        assert module.INNER.__code__.co_qualname == "main.<locals>.loss_fn"
    with pytest.raises(UserError) as error:
        module.INNER([1], h)
    assert "loss_fn" in [frame.name for frame in traceback.extract_tb(error.tb)]


def test_variables_in_another_order():
    """Cells are handed over by position: code that orders them otherwise than the compiler is not replaced."""
    module = script(plain())
    outer = module.main.__code__
    (inner,) = (x for x in outer.co_consts if getattr(x, "co_name", "") == "loss_fn")
    assert len(inner.co_freevars) == 2
    other = inner.replace(co_freevars=inner.co_freevars[::-1])
    module.main.__code__ = outer.replace(co_consts=tuple(other if x is inner else x for x in outer.co_consts))
    before = dict(vars(module)), module.main.__code__
    with pytest.raises(UserError, match="loss_fn in main, line 3: has variables .*; leave it by loss=None"):
        vjepa2(module)
    assert (dict(vars(module)), module.main.__code__) == before


# -- what arguments hold -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("p", [1.0, 1.5, 2.0])
def test_targets_of_inference_mode(p):
    module = script(plain())
    vjepa2(module)
    h, z, masks = inputs()
    with torch.inference_mode():
        h, masks = [x.clone() for x in h], [[m.clone() for m in mi] for mi in masks]
    flat = [x for zi in z for x in zi]
    for _ in range(2):
        got, wanted = module.main(h, z, masks, p), module.main.vjepa_fast_original(h, z, masks, p)
        assert torch.allclose(got, wanted)
        for a, b in zip(torch.autograd.grad(got, flat), torch.autograd.grad(wanted, flat)):
            assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("change", [lambda h: [[x] for x in h], lambda h: None, lambda h: [1 for _ in h]])
def test_targets_of_another_form(change):
    module = script(plain())
    vjepa2(module)
    h, z, masks = inputs()
    with pytest.raises(UserError, match=r"loss_fn in main, line 3: h: expected a list of tensors .*; leave it"):
        module.main(change(h), z, masks, 1.0)


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0])
def test_a_loss_that_is_not_a_number_any_more(p):
    """A run whose loss is NaN goes on as the original does."""
    module = script(plain())
    vjepa2(module)
    h, z, masks = inputs()
    with torch.no_grad():
        z[0][0][0, 0, 0] = float("nan")
    assert module.main(h, z, masks, p).isnan()


@pytest.mark.parametrize("size", [1e-4, 1e-6])
def test_gradients_that_are_a_little_different(size):
    """The value is the same, the gradient by this part of it too large."""
    module = script(plain().replace("(a - b", f"(a + {size} * (a - a.detach()) - b"))
    vjepa2(module)
    h, z, masks = inputs()
    if size > 3e-5:
        with pytest.raises(UserError, match="has other gradients than the original"):
            module.main(h, z, masks, 1.0)
    else:
        module.main(h, z, masks, 1.0)


def test_the_form_with_class_tokens_may_use_nothing_else():
    module = later("SCALE")
    vars(module)["SCALE"] = 1.0
    with pytest.raises(UserError, match="uses SCALE as well"):
        vjepa2(module)
