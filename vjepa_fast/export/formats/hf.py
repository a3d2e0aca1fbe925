"""Folders for Hugging Face's transformers: its own ``VJEPA2Model``, else a model that brings its code along."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from vjepa_fast.errors import UserError
from vjepa_fast.export import remote
from vjepa_fast.export.api import FORMATS, Format, Outputs, Reader
from vjepa_fast.export.formats.weights import is_vjepa2, save_tensors
from vjepa_fast.files import write_json, write_text
from vjepa_fast.models.describe import HF_TYPE, architecture, settings
from vjepa_fast.models.names import to_hf
from vjepa_fast.models.vit import VisionTransformer

FILES = ("configuration_vjepa21.py", "encoder_vjepa21.py", "modeling_vjepa21.py")
_AUTO = {"AutoConfig": "configuration_vjepa21.VJEPA21Config", "AutoModel": "modeling_vjepa21.VJEPA21Model"}


class HuggingFace(Format):
    """A folder of ``config.json``, ``model.safetensors`` and ``video_preprocessor_config.json``."""

    what = "a folder for transformers"

    def write(self, encoder: VisionTransformer, path: Path, which: str) -> str:
        """A folder with transformers' own model where that computes the same, else with our code in it."""
        path.mkdir()
        write_json(path / "video_preprocessor_config.json", processor(encoder), indent=2)
        if reason := not_vjepa2(encoder):
            _write_remote(encoder, path)
            return f"AutoModel with trust_remote_code=True, as VJEPA2Model cannot hold {reason}"
        _write_native(encoder, path)
        return "VJEPA2Model; its predictor is a placeholder of zeros (pass skip_predictor=True)"

    def read(self, path: Path, encoder: VisionTransformer, which: str) -> Reader:
        """By ``from_pretrained``."""
        if not_vjepa2(encoder):
            return _read_remote(path, encoder)
        with transformers() as hf:
            model = hf.VJEPA2Model.from_pretrained(path).eval()

        def read(clip: Tensor) -> Outputs:
            return {"features": model(clip.transpose(1, 2), skip_predictor=True).last_hidden_state}

        return read


def not_vjepa2(encoder: VisionTransformer) -> str:
    """What of an encoder transformers' ``VJEPA2Model`` cannot hold; empty where it can hold it."""
    height, width = encoder.img_size
    reasons = {
        "levels, or embeddings of images": not is_vjepa2(encoder),
        "added positions": not encoder.use_rope,
        "RoPE in pairs": encoder.use_rope and encoder.rope_variant != "v2",
        "interpolated RoPE": encoder.rope_base is not None,
        "SwiGLU": hasattr(encoder.blocks[0].mlp, "fc3"),
        "a class token": encoder.cls_token is not None,
        "block-causal attention": encoder.block_causal,
        "clips that are not square": height != width,
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def processor(encoder: VisionTransformer) -> dict[str, Any]:
    """``video_preprocessor_config.json``: the centre view of evaluation, with the encoder's own mean and std."""
    height, width = encoder.img_size
    return {
        "video_processor_type": "VJEPA2VideoProcessor",
        "do_resize": True,
        "size": {"shortest_edge": round(min(height, width) * 256 / 224)},
        "resample": 2,
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(encoder.mean),
        "image_std": list(encoder.std),
    }


def _write_native(encoder: VisionTransformer, path: Path) -> None:
    with transformers() as hf:
        config = hf.VJEPA2Config(
            patch_size=encoder.patch_size,
            crop_size=encoder.img_size[0],
            frames_per_clip=encoder.num_frames,
            tubelet_size=encoder.tubelet_size,
            hidden_size=encoder.embed_dim,
            num_attention_heads=encoder.num_heads,
            num_hidden_layers=len(encoder.blocks),
            mlp_ratio=encoder.mlp_ratio,
            pred_hidden_size=encoder.embed_dim,
            pred_num_attention_heads=encoder.num_heads,
            pred_num_hidden_layers=0,
            pred_num_mask_tokens=1,
        )
        with torch.device("meta"):
            model = hf.VJEPA2Model(config)
        empty = {key: torch.zeros(value.shape) for key, value in model.state_dict().items() if "predictor." in key}
        model.load_state_dict({**empty, **to_hf(encoder.state_dict())}, assign=True)
        model.save_pretrained(path)


def _write_remote(encoder: VisionTransformer, path: Path) -> None:
    here = Path(remote.__file__).parent
    for name in FILES:
        write_text(path / name, (here / name).read_text(encoding="utf-8"))
    config = {"architectures": ["VJEPA21Model"], "auto_map": _AUTO, "model_type": HF_TYPE, "dtype": "float32"}
    write_json(path / "config.json", {**config, **architecture(encoder), "clip_settings": settings(encoder)}, indent=2)
    save_tensors({f"encoder.{key}": x for key, x in encoder.state_dict().items()}, path / "model.safetensors")


def _read_remote(path: Path, encoder: VisionTransformer) -> Reader:
    with transformers():
        model = _modules(path).VJEPA21Model.from_pretrained(path).eval()

    def read(clip: Tensor) -> Outputs:
        out = model(clip.transpose(1, 2))
        found = {"features": out.levels}
        return found if encoder.cls_token is None else {**found, "summary": out.pooler_output}

    return read


def _modules(folder: Path) -> ModuleType:
    """``modeling_vjepa21.py`` of a folder, imported from there and from nowhere else."""
    package = f"_vjepa_fast_exported_{abs(hash(str(folder.resolve())))}"
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        del sys.modules[name]
    spec = importlib.util.spec_from_loader(package, None, is_package=True)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    module.__path__ = [str(folder)]
    sys.modules[package] = module
    return importlib.import_module(f"{package}.modeling_vjepa21")


@contextmanager
def transformers() -> Iterator[Any]:
    """The package transformers, quiet.

    It looks for a package ``kernels`` of its own; in a checkout of this project it would find the folder of that name,
    so the folders that have one are taken off the path until it is imported.

    Raises:
        UserError: it is not installed.
    """
    before = sys.path[:]
    sys.path[:] = [path for path in before if not (Path(path or ".") / "kernels" / "block_masks.py").is_file()]
    try:
        import transformers  # pyright: ignore[reportMissingImports]
        from transformers import VJEPA2Model as _  # pyright: ignore[reportMissingImports]  # noqa: F401
        from transformers.utils import logging  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError("--to hf needs transformers 4.57 or later: pip install 'vjepa-fast[hf]'") from error
    finally:
        sys.path[:] = before
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield transformers
    finally:
        if bars:
            logging.enable_progress_bar()


FORMATS.add("hf", HuggingFace())
