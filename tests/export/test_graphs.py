"""Graphs of torch.export and ONNX."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from vjepa_fast.errors import UserError
from vjepa_fast.export import export_encoder
from vjepa_fast.export.formats import graphs

CLIPS = torch.randn(3, 3, 4, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", ["V-JEPA 2.1", "LeVJEPA"])
def test_torch_export(tmp_path, make, kind):
    encoder, file = make(kind), tmp_path / "x.pt2"
    export_encoder(encoder, "torch-export", file)
    extra = {"vjepa_fast": ""}
    graph = torch.export.load(file, extra_files=extra).module()
    assert json.loads(extra["vjepa_fast"])["architecture"]["mean"] == list(encoder.mean)
    for clips in (CLIPS, CLIPS[:1]):
        out = graph(clips)
        features = out[0] if kind == "LeVJEPA" else out
        wanted = encoder(clips)
        assert (features - wanted).abs().max() < 1e-5 * wanted.abs().max()
        if kind == "LeVJEPA":
            assert (out[1] - encoder.summary(clips, None)).abs().max() < 1e-5 * wanted.abs().max()


def test_torch_export_needs_torch_alone(tmp_path, make):
    export_encoder(make("V-JEPA 2"), "torch-export", tmp_path / "x.pt2")
    code = (
        "import sys, torch; graph = torch.export.load('x.pt2').module()\n"
        "print(tuple(graph(torch.zeros(1, 3, 4, 32, 32)).shape), 'vjepa_fast' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, text=True, capture_output=True, timeout=120)
    assert done.stdout.strip() == "(1, 32, 24) False", done.stderr


def test_onnx(tmp_path, make, monkeypatch):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    encoder, file = make("V-JEPA 2.1"), tmp_path / "x.onnx"
    export_encoder(encoder, "onnx", file)
    model = onnx.load(file)
    onnx.checker.check_model(model)
    assert {domain.domain for domain in model.opset_import if domain.version} <= {"", "ai.onnx"}
    (described,) = (entry.value for entry in model.metadata_props if entry.key == "vjepa_fast")
    assert json.loads(described)["architecture"]["std"] == list(encoder.std)
    wanted, there = encoder(CLIPS), graphs.find_spec
    by_runtime = graphs._session(file)(CLIPS)
    monkeypatch.setattr(graphs, "find_spec", lambda name: None if name == "onnxruntime" else there(name))
    by_reference = graphs._session(file)(CLIPS)  # of onnx, where there is no onnxruntime
    for (out,) in (by_runtime, by_reference):
        assert (torch.from_numpy(out) - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_what_onnx_needs(tmp_path, make, monkeypatch):
    monkeypatch.setattr(graphs, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--to onnx: it needs onnx and onnxscript: pip install 'vjepa-fast\[onnx\]'"):
        export_encoder(make("V-JEPA 2"), "onnx", tmp_path / "x.onnx")
