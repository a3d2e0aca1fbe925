"""Fixtures that several parts share."""

from __future__ import annotations

import gc
import importlib.util
import pathlib
import sys

import pytest
import torch

gc.disable()  # until all is imported

if importlib.util.find_spec("triton") is not None and not torch.cuda.is_available():
    sys.path.insert(0, str(pathlib.Path(__file__).parent))
    from interpreter import use_interpreter

    use_interpreter()


@pytest.fixture(autouse=True)
def _backend_as_before():
    """No test leaves a backend chosen for those that follow in this thread."""
    from vjepa_fast import ops

    before = ops.current_backend()
    yield
    assert ops.current_backend() == before, "the test left a backend chosen: use `with ops.use_backend(...)`"


@pytest.fixture(scope="session")
def tiny_suites(tmp_path_factory) -> dict[str, dict[str, str]]:
    """Real files: ``tiny_suites["motion8"]["train"]`` is the path of a manifest; likewise val, test, and "objects".

    motion8: 12 / 8 / 8 H.264 videos, 16 frames of 64 x 64, 8 classes. objects: 12 / 8 / 8 JPEG images, 4 classes.
    """
    from vjepa_fast.data.synthetic import Objects, render_suite

    folder = tmp_path_factory.mktemp("suites")
    splits = {"train": 12, "val": 8, "test": 8}
    objects = Objects(shapes=("disc", "cross"), patterns=("solid", "stripes"), colours=("red",))
    return {
        "motion8": render_suite("motion8", folder / "motion8", splits=splits, size=64, frames=16),
        "objects": render_suite(objects, folder / "objects", splits=splits, size=64),
    }


def pytest_collection_finish() -> None:
    """What was imported to collect the tests stays; no collection of garbage need look at it again."""
    gc.freeze()
    gc.enable()


@pytest.hookimpl(tryfirst=True)  # before xdist reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that share a fixture of their file run in one process (``--dist loadgroup``), so that it is made once."""
    for item in items:
        shared = [
            definition
            for definitions in getattr(getattr(item, "_fixtureinfo", None), "name2fixturedefs", {}).values()
            for definition in definitions
            if definition.scope in ("module", "session") and definition.baseid == item.nodeid.split("::")[0]
        ]
        if shared and item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(shared[0].baseid))
