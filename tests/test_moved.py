"""Module names of version 0.1.0 still import."""

import importlib
import importlib.util
import inspect
import sys

import pytest

from vjepa_fast._moved import MOVED


@pytest.fixture
def fresh():
    """No old name is imported yet."""
    for name in MOVED:
        if sys.modules.pop(f"vjepa_fast.{name}", None) is not None:
            package, _, leaf = f"vjepa_fast.{name}".rpartition(".")
            vars(sys.modules[package]).pop(leaf, None)


@pytest.mark.parametrize(
    ("old", "name", "now"),
    [
        ("data.scan", "scan_folder", "data.manifests.scan"),
        ("data.scan", "check_manifest", "data.manifests.check"),
        ("evaluation.features", "Features", "evaluation.extract.features"),
        ("models.attention", "Block", "layers.block"),
        ("ops.geometry", "rankme", "metrics.geometry"),
        ("study.pool", "run_tasks", "study.jobs.pool"),
        ("trainer.profile", "analyse", "metrics.profile"),
    ],
)
def test_a_name_is_found_where_it_is_now(fresh, old, name, now):
    with pytest.warns(DeprecationWarning, match=rf"vjepa_fast.{old} is .*vjepa_fast.{now}"):
        module = importlib.import_module(f"vjepa_fast.{old}")
    assert getattr(module, name) is getattr(importlib.import_module(f"vjepa_fast.{now}"), name)
    with pytest.raises(AttributeError, match=rf"vjepa_fast.{old}.*now vjepa_fast.*no attribute 'nothing_of_that'"):
        module.nothing_of_that  # noqa: B018
    assert inspect.getmodule(module) is module  # asks for __file__, which a name like this has not


def test_from_the_package(fresh):
    with pytest.warns(DeprecationWarning, match="vjepa_fast.ops.geometry is vjepa_fast.metrics.geometry now"):
        from vjepa_fast.ops import geometry
    assert callable(geometry.rankme)


def test_every_old_name_leads_to_modules_that_exist_and_hides_none():
    for old, places in MOVED.items():
        for place in places.split():
            assert importlib.util.find_spec(f"vjepa_fast.{place}") is not None, (old, place)
        spec = importlib.util.find_spec(f"vjepa_fast.{old}")
        assert spec is not None
        assert spec.origin is None, f"{old} is a module again: take it off the list"
    assert importlib.util.find_spec("vjepa_fast.ops.no_such_module") is None
