"""Graphs of the encoder for clips of one size and any batch: torch.export's and ONNX's, without an op of this package.

Their input is ``clip``, normalised float32 [B,3,F,height,width]; their outputs are ``features`` [B,N,L*E] and, with a
class token, ``summary`` [B,E]. What the encoder is, and how its clips were made and normalised, stands beside the graph
as JSON: the metadata ``vjepa_fast`` of the ONNX model, the extra file of that name of the other.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vjepa_fast.errors import UserError
from vjepa_fast.export.api import FORMATS, Format, Outputs, Reader, seeded_clips
from vjepa_fast.export.plain import FixedEncoder
from vjepa_fast.models.describe import KEY, metadata
from vjepa_fast.models.vit import VisionTransformer

NAMES = ("features", "summary")
_ONE_FILE = 2**31 - 2**24  # bytes of weights that fit into an ONNX file, which protobuf limits to 2 GiB


class TorchExport(Format):
    """A ``.pt2`` file of ``torch.export``."""

    what = "a graph of torch.export"
    suffix = ".pt2"
    images = False

    def write(self, encoder: VisionTransformer, path: Path, which: str) -> str:
        """The graph with its weights."""
        (clip,) = seeded_clips(encoder, images=False)
        with _quiet():
            program = torch.export.export(
                FixedEncoder(encoder).eval(), (clip,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},)
            )
            torch.export.save(program, path, extra_files={KEY: metadata(encoder)[KEY]})
        return f"clips {_size(encoder)}"

    def read(self, path: Path, encoder: VisionTransformer, which: str) -> Reader:
        """By ``torch.export.load``."""
        with _quiet():
            graph = torch.export.load(path).module()
        return lambda clip: _named(_one_by_one(graph, clip))


class Onnx(Format):
    """An ``.onnx`` file; weights over 2 GiB are in a second one, ``.onnx.data``."""

    what = "a graph of ONNX"
    suffix = ".onnx"
    images = False

    def objection(self, encoder: VisionTransformer) -> str:
        """Packages that are missing."""
        missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
        return f"it needs {' and '.join(missing)}: pip install 'vjepa-fast[onnx]'" if missing else ""

    def write(self, encoder: VisionTransformer, path: Path, which: str) -> str:
        """The graph with its weights, opset 18."""
        (clip,) = seeded_clips(encoder, images=False)
        large = sum(p.numel() * p.element_size() for p in encoder.parameters()) > _ONE_FILE
        with _quiet():
            program = torch.onnx.export(
                FixedEncoder(encoder).eval(),
                (clip,),
                dynamo=True,
                opset_version=18,
                input_names=["clip"],
                output_names=list(NAMES[: 1 + (encoder.cls_token is not None)]),
                dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            )
            assert program is not None  # it is None where there is no dynamo
            program.model.metadata_props.update(metadata(encoder))
            program.save(str(path), external_data=large)
        return f"opset 18, clips {_size(encoder)}" + (f", weights in {path.name}.data" if large else "")

    def read(self, path: Path, encoder: VisionTransformer, which: str) -> Reader:
        """By onnxruntime, or where that is not installed by the reference evaluator of onnx."""
        run = _session(path)
        return lambda clip: _named(_one_by_one(lambda x: [torch.from_numpy(y) for y in run(x)], clip))


def _session(path: Path) -> Any:
    if find_spec("onnxruntime") is None:
        from onnx.reference import ReferenceEvaluator  # pyright: ignore[reportMissingImports]

        evaluator = ReferenceEvaluator(str(path))
        return lambda clip: evaluator.run(None, {"clip": clip.numpy()})
    import onnxruntime  # pyright: ignore[reportMissingImports]

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda clip: session.run(None, {"clip": clip.numpy()})


def _one_by_one(graph: Any, clip: Tensor) -> list[Tensor]:
    """What a graph made with two clips says of them one at a time."""
    parts = [graph(one) for one in clip.split(1)]
    parts = [part if isinstance(part, (tuple, list)) else (part,) for part in parts]
    return [torch.cat(outs) for outs in zip(*parts)]


def _named(values: list[Tensor]) -> Outputs:
    return dict(zip(NAMES, values))


def _size(encoder: VisionTransformer) -> str:
    height, width = encoder.img_size
    return f"[B,3,{encoder.num_frames},{height},{width}], any B"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Exporters print and warn of their own insides."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    except ImportError as error:
        raise UserError(f"export: {error}; install what is missing") from error
    finally:
        logging.disable(level)


FORMATS.add("torch-export", TorchExport())
FORMATS.add("onnx", Onnx())
