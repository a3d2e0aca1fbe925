"""Reading frames of video files with torchcodec, on the CPU or by NVDEC, held against the `FrameIndex`.

torchcodec gives each frame with its time stamp. A clip is taken only if these are the ones that the index has for the
frames asked for; files whose time stamps are worth nothing, and all that torchcodec does not read, go to PyAV, which
gives the same pictures. torchcodec does not report frames that its decoder painted over, so ``data.corrupt: refuse``
covers what the index knows of damage, and packets that cannot be decoded.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from vjepa_fast.data.decoders.api import DECODERS, Video
from vjepa_fast.data.decoders.index import FrameIndex
from vjepa_fast.data.decoders.index_cache import INDICES
from vjepa_fast.data.decoders.plain import why_not_plain
from vjepa_fast.data.decoders.pyav import PyAV
from vjepa_fast.data.media import ReadOptions, one_line, read_bytes
from vjepa_fast.data.members import member_of

_log = logging.getLogger("vjepa_fast.data")


@DECODERS.register("torchcodec")
class TorchCodec(PyAV):
    """torchcodec on the CPU, with the FFmpeg libraries of the system; PyAV where it cannot be held to the index.

    Attributes:
        refused: files that turned out to be PyAV's. slow: those that the GPU did not decode.
    """

    device = "cpu"

    def __init__(self) -> None:
        self.refused: set[str] = set()
        self.slow: set[str] = set()

    @classmethod
    def objections(cls) -> list[str]:
        """PyAV or torchcodec is missing, or there are no FFmpeg libraries that torchcodec can load."""
        return [*PyAV.objections(), *([reason] if (reason := _missing()) else [])]

    @contextmanager
    def open(self, path: str) -> Iterator[Video]:
        """As ``Decoder.open``."""
        with super().open(path) as video:
            index = INDICES.get(path, self.options)
            usual = path in self.refused or why_not_plain(path, index, self.options)
            yield video if usual else _Video(video, index, self.options, self.device, self.refuse, self.fell_back)

    def fell_back(self, path: str, status: str) -> None:
        """A film is decoded on the CPU in place of the GPU."""
        if not self.slow:
            said = " ".join(status.split())
            _log.warning("%s: not decoded by the GPU but on the CPU (%s), as may be others", path, said)
        self.slow.add(path)

    def refuse(self, path: str) -> None:
        """Read this file with PyAV from now on."""
        if not self.refused:
            _log.info("%s and files like it are read by PyAV: torchcodec gives other frames, or none", path)
        self.refused.add(path)


@DECODERS.register("torchcodec-cuda")
class TorchCodecCuda(TorchCodec):
    """torchcodec by NVDEC: frames come back to the host, and films that NVDEC refuses are decoded on the CPU."""

    device = "cuda"

    @classmethod
    def objections(cls) -> list[str]:
        """As `TorchCodec`, or there is no GPU."""
        import torch

        return super().objections() + ([] if torch.cuda.is_available() else ["torch finds no CUDA device here"])


@functools.cache
def _missing() -> str | None:
    if importlib.util.find_spec("torchcodec") is None:
        return "torchcodec is not installed (pip install torchcodec, and FFmpeg's shared libraries)"
    try:
        import torchcodec.decoders as decoders
    except (ImportError, OSError, RuntimeError) as error:
        return f"torchcodec does not import: {one_line(error)[:160]}; it needs FFmpeg's shared libraries"
    if hasattr(decoders, "set_nvdec_cache_capacity"):  # a decoder kept for the next film may crop it as it did its own
        decoders.set_nvdec_cache_capacity(0)
    return None


class _Video(Video):
    """A video whose frames come from torchcodec where they are the right ones, else from ``plain``."""

    def __init__(
        self,
        plain: Video,
        index: FrameIndex,
        options: ReadOptions,
        device: str,
        refuse: Callable[[str], None],
        fell_back: Callable[[str, str], None],
    ) -> None:
        super().__init__(plain.path, plain.info)
        self.plain, self.index, self.times = plain, index, plain.times
        self.options, self.device, self._refuse, self._fell_back = options, device, refuse, fell_back

    def recount(self) -> bool:
        """As the plain video's."""
        changed = self.plain.recount()
        self.info, self.times = self.plain.info, self.plain.times
        return changed

    def verify(self, on_share: Callable[[float], None]) -> None:
        """As the plain video's, which sees more damage."""
        self.plain.verify(on_share)

    def read(self, numbers: np.ndarray, size: tuple[int, int] | None) -> np.ndarray:
        """As ``Video.read``; clips that are scaled are PyAV's."""
        if size is None:
            self.options.check_clip(self.path, len(numbers), self.info["height"], self.info["width"])
            if (pictures := self._decode(numbers)) is not None:
                return pictures
            self._refuse(self.path)
        return self.plain.read(numbers, size)

    def _decode(self, numbers: np.ndarray) -> np.ndarray | None:
        """The frames, or None if torchcodec does not give these."""
        from torchcodec.decoders import VideoDecoder

        source = self.path if member_of(self.path) is None else read_bytes(self.path).tobytes()
        wanted, back = np.unique(numbers, return_inverse=True)
        try:
            film = VideoDecoder(source, dimension_order="NHWC", device=self.device, seek_mode="exact")
            batch = film.get_frames_at(wanted.tolist())
        except (RuntimeError, ValueError, IndexError):  # whichever it is, PyAV says it better, or reads the file
            return None
        if self.device != "cpu" and film.cpu_fallback:
            self._fell_back(self.path, str(film.cpu_fallback))
        shown = np.rint(batch.pts_seconds.cpu().numpy() / self.index.time_base)
        pictures = batch.data.cpu().numpy()
        right = np.array_equal(shown, self.index.pts[wanted])
        if not right or pictures.shape[1:3] != (self.info["height"], self.info["width"]):
            return None
        return pictures if len(wanted) == len(numbers) else pictures[back]
