"""VJEPA_FAST_DEBUG=1 looks at the values of indices: on every device, and for repeats where they would do harm."""

import pytest
import torch

from vjepa_fast import ops
from vjepa_fast.objectives import LatentState, build_objectives
from vjepa_fast.ops import _check

WRONG = torch.tensor([[0, 8]])


@pytest.fixture
def debug(monkeypatch):
    monkeypatch.setenv("VJEPA_FAST_DEBUG", "1")


@pytest.mark.parametrize(("value", "on"), [("1", True), ("0", False), ("", False)])
def test_the_variable(monkeypatch, value, on):
    monkeypatch.setenv("VJEPA_FAST_DEBUG", value)
    assert _check.debugging() == on
    monkeypatch.delenv("VJEPA_FAST_DEBUG")
    assert not _check.debugging()


def test_range_is_checked_on_the_cpu_anyhow(monkeypatch):
    monkeypatch.delenv("VJEPA_FAST_DEBUG", raising=False)
    with pytest.raises(ValueError, match=r"op: idx: expected token indices in \[0, 8\), got \[0, 8\]"):
        _check.in_range("op", "idx", WRONG, 8)
    _check.in_range("op", "idx", WRONG, 9)
    _check.in_range("op", "idx", WRONG[:, :0], 0)


def test_range_is_checked_elsewhere_only_if_asked(monkeypatch):
    looked = []
    monkeypatch.setattr(torch, "aminmax", lambda idx: looked.append(idx) or (torch.tensor(0), torch.tensor(8)))
    elsewhere = WRONG.to("meta")  # has no values: whether they are looked at shows
    monkeypatch.delenv("VJEPA_FAST_DEBUG", raising=False)
    _check.in_range("op", "idx", elsewhere, 8)
    assert not looked
    monkeypatch.setenv("VJEPA_FAST_DEBUG", "1")
    with pytest.raises(ValueError, match="op: idx: expected token indices"):
        _check.in_range("op", "idx", elsewhere, 8)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_wrong_indices_on_the_gpu(debug, backend):
    enc, pred = WRONG.cuda(), torch.tensor([[1]]).cuda()
    with ops.use_backend(backend), pytest.raises(ValueError, match="mask_distance: masks_enc: expected token indices"):
        ops.mask_distance(enc, pred, (2, 2, 2))


def test_distinct(debug, monkeypatch):
    idx = torch.tensor([[3, 1, 2], [1, 2, 1]])
    with pytest.raises(ValueError, match=r"op: idx: expected distinct token indices in each row, got \[1\]"):
        _check.distinct("op", "idx", idx)
    _check.distinct("op", "idx", idx[:1])
    _check.distinct("op", "idx", idx[:, :1])
    _check.distinct("op", "idx", idx[:0])
    monkeypatch.setenv("VJEPA_FAST_DEBUG", "0")
    _check.distinct("op", "idx", idx)


@pytest.mark.parametrize(
    ("masks_enc", "text"),
    [
        ([[0, 4, 4]], r"objectives: masks_enc: expected distinct token indices in each row, got \[4\]"),
        ([[0, 4, 8]], r"objectives: masks_enc: expected token indices in \[0, 8\), got \[0, 8\]"),
    ],
)
def test_objectives_refuse_masks_that_would_lead_gradients_astray(debug, masks_enc, text):
    plan = build_objectives({"delta": {}}, levels=1, embed_dim=4)
    z = torch.ones(1, 3, 4, requires_grad=True)
    state = LatentState(grids=[(2, 2, 2)], h=[torch.ones(1, 8, 4)], z=[[z]], masks_enc=[[torch.tensor(masks_enc)]])
    with pytest.raises(ValueError, match=text):
        plan(state)
