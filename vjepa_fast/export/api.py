"""What an export format is, and the export itself: write, read back, compare, and only then let the file appear.

Legend: B batch, F frames, N tokens, L levels, E width.
"""

from __future__ import annotations

import copy
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vjepa_fast.errors import UserError
from vjepa_fast.files import atomic_entries, first_line
from vjepa_fast.models.vit import VisionTransformer
from vjepa_fast.registry import Registry

Outputs = dict[str, Tensor]  # "features" [B,N,L*E], and "summary" [B,E] of a class token
Reader = Callable[[Tensor], Outputs]


class Format(ABC):
    """A form in which encoders leave this package. One that derives from it registers an instance in `FORMATS`.

    Attributes:
        what: in words, for messages.
        tolerance: largest difference allowed between what is read back and the encoder, over the encoder's largest
            value; 0: to the last bit.
        suffix: of the file; empty: a folder.
        images: whether still images are compared as well, where the encoder has an embedding of its own for them.
    """

    what: str
    tolerance: float = 1e-4
    suffix: str = ""
    images: bool = True

    def objection(self, encoder: VisionTransformer) -> str:
        """Why this encoder cannot be written so, and what to do; empty where it can."""
        return ""

    @abstractmethod
    def write(self, encoder: VisionTransformer, path: Path, which: str) -> str:
        """Write ``path``, and other files beside it if need be; returns words on what it is."""

    @abstractmethod
    def read(self, path: Path, encoder: VisionTransformer, which: str) -> Reader:
        """What was written, as its users run it: a function of normalised clips [B,3,F,height,width]."""


def _check(name: str, entry: Format) -> None:
    if not isinstance(entry, Format):
        raise TypeError(f"export format {name!r} must be an instance of vjepa_fast.export.Format")


FORMATS: Registry[Format] = Registry("export format", package="vjepa_fast.export.formats", check=_check)


@dataclass(frozen=True)
class Exported:
    """What `export_encoder` did.

    Attributes:
        path: of the file or folder.
        what: it is, in words.
        difference: largest absolute difference between what was read back and the encoder.
        largest: largest absolute value of the encoder on the same clips.
        tolerance: as of the format; ``difference`` is at most so much times ``largest``.
        clips: shapes of the clips that were compared.
    """

    path: Path
    what: str
    difference: float
    largest: float
    tolerance: float
    clips: tuple[tuple[int, ...], ...]


def export_encoder(encoder: VisionTransformer, to: str, out: str | Path, *, which: str = "target_encoder") -> Exported:
    """Write an encoder in another form, read it back and compare it on seeded clips; only then ``out`` appears.

    Args:
        encoder: of ``load_encoder``; written in float32.
        to: name of the format, one of `FORMATS`.
        out: file or folder; must not exist.
        which: under which name, ``target_encoder`` or ``encoder``, files that hold several networks have it.

    Raises:
        UserError: no such format, ``out`` exists or cannot be written, a format that cannot hold this encoder, a
            library that is missing, or a difference over the tolerance. Nothing is left behind.
    """
    form, out = FORMATS.get_named(to, "to"), Path(out)
    if out.exists():
        raise UserError(f"{out}: exists; remove it or choose another --out")
    if not form.suffix and out.suffix in (".pt", ".pth", ".onnx", ".pt2", ".safetensors"):
        raise UserError(f"{out}: {to} is a folder, not a {out.suffix} file; choose another --out")
    if form.suffix and out.suffix != form.suffix:
        raise UserError(f"{out}: the name of a {to} file ends in {form.suffix}; choose another --out")
    encoder = _plain_float32(encoder)
    if reason := form.objection(encoder):
        raise UserError(f"--to {to}: {reason}")
    clips = seeded_clips(encoder, form.images)
    with torch.no_grad():
        wanted = [outputs(encoder, clip) for clip in clips]
    with atomic_entries(out) as place:
        try:
            what = form.write(encoder, place, which)
            with torch.no_grad(), _without_reports():
                read = form.read(place, encoder, which)
                got = [read(clip) for clip in clips]
        except (OSError, UserError):
            raise
        except Exception as error:
            raise UserError(f"--to {to}: {type(error).__name__}: {first_line(error)}; nothing was written") from error
        difference, largest = compare(wanted, got)
        if not difference <= form.tolerance * largest:
            raise UserError(
                f"--to {to}: what was written differs from the encoder by {difference:.3g} at values up to "
                f"{largest:.3g}; {form.tolerance:g} of that is allowed, so nothing was written"
            )
    return Exported(out, what, difference, largest, form.tolerance, tuple(tuple(clip.shape) for clip in clips))


def seeded_clips(encoder: VisionTransformer, images: bool) -> list[Tensor]:
    """Two normalised clips of the configured size, [2,3,F,height,width], and with ``images`` two still images.

    Always the same numbers; torch's own generator is left alone.
    """
    frames = [encoder.num_frames]
    if images and encoder.img_temporal_dim_size not in (None, encoder.num_frames):
        frames.append(encoder.img_temporal_dim_size)
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, f, *encoder.img_size, generator=generator) for f in frames]


def outputs(encoder: VisionTransformer, clip: Tensor) -> Outputs:
    """What an encoder says of clips."""
    found = {"features": encoder(clip)}
    if encoder.cls_token is not None:
        found["summary"] = encoder.summary(clip, None)
    return found


def compare(wanted: list[Outputs], got: list[Outputs]) -> tuple[float, float]:
    """(largest difference, largest wanted value); the former is infinite where names or shapes differ, or on NaN."""
    difference = largest = 0.0
    for one, other in zip(wanted, got):
        for name, value in one.items():
            if name not in other or other[name].shape != value.shape:
                return float("inf"), float(value.abs().max())
            apart = float((other[name].double() - value.double()).abs().max())
            difference = max(difference, apart) if apart == apart else float("inf")
            largest = max(largest, float(value.abs().max()))
    return difference, largest


@contextmanager
def _without_reports() -> Iterator[None]:
    """What ``load_encoder`` says of a file is of no use for one that has no name yet."""
    log = logging.getLogger("vjepa_fast")
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(level)


def _plain_float32(encoder: VisionTransformer) -> VisionTransformer:
    weight = encoder.patch_embed.proj.weight
    if weight.device.type == "cpu" and weight.dtype == torch.float32 and not encoder.training:
        return encoder
    return copy.deepcopy(encoder).cpu().float().eval()
