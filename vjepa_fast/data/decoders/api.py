"""What a decoder is: it opens a video and returns the frames asked for by their numbers.

Which frames make a clip is `Sampling`'s business and the same for all decoders. F frames, H x W pixels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn, TypedDict

import numpy as np

from vjepa_fast.data.media import ReadOptions
from vjepa_fast.data.sampling import Sampling
from vjepa_fast.errors import ConfigError, DataError
from vjepa_fast.registry import Registry

if TYPE_CHECKING:
    import torch

_PIECE = 16  # frames decoded at a time when all are
AUTO = "pyav"  # what ``data.decoder: auto`` uses


class VideoInfo(TypedDict):
    """What there is to know of a video: frames counted or announced, frames per second, size as shown."""

    frames: int
    fps: float
    height: int
    width: int
    codec: str


class Video(ABC):
    """An open video.

    Attributes:
        path: its file.
        info: of its frames; ``info["frames"]`` may be an estimate, which `recount` puts right.
        times: float64 ``[frames]``, seconds of each frame from the first, where the rate varies; else None.
    """

    times: np.ndarray | None = None

    def __init__(self, path: str, info: VideoInfo) -> None:
        self.path, self.info = path, info

    @abstractmethod
    def read(self, numbers: np.ndarray, size: tuple[int, int] | None) -> np.ndarray:
        """The frames of these numbers.

        Args:
            numbers: int64 ``[F]``, ascending, repeats allowed; they count from 0 in the order shown.
            size: (height, width) to scale to, bilinear; None: the video's own.

        Returns:
            uint8 ``[F, H, W, 3]``, RGB.

        Raises:
            DataError: a frame cannot be decoded.
        """

    def recount(self) -> bool:
        """Whether ``info["frames"]`` was wrong and is another number now. Called if `read` failed."""
        return False

    def verify(self, on_share: Callable[[float], None]) -> None:
        """Decode every frame; in pieces, so that memory does not grow with the video.

        Args:
            on_share: called with the share decoded so far.

        Raises:
            DataError: a frame cannot be decoded.
        """
        total = self.info["frames"]
        for first in range(0, total, _PIECE):
            self.read(np.arange(first, min(first + _PIECE, total)), None)
            on_share(min(1.0, (first + _PIECE) / total))


@dataclass(frozen=True)
class WholeVideo:
    """A decoded video, from which ``clip`` takes the same frames as ``Decoder.read_clip`` does from the file.

    Attributes:
        frames: uint8 ``[F, H, W, 3]``. fps: frames per second. claimed: number of frames before a recount.
        times: as ``Video.times``.
    """

    frames: np.ndarray
    fps: float
    claimed: int
    times: np.ndarray | None = None

    def clip(
        self, path: str, num_frames: int, sampling: Sampling, start: str | float, generator: np.random.Generator | None
    ) -> np.ndarray:
        """uint8 ``[num_frames, H, W, 3]``; arguments and errors as ``Sampling.indices``."""
        numbers = sampling.indices(path, self.claimed, self.fps, num_frames, start, generator, self.times)
        if numbers[-1] >= len(self.frames):
            numbers = sampling.indices(path, len(self.frames), self.fps, num_frames, start, generator, self.times)
        return self.frames[numbers]


@dataclass(frozen=True)
class Facts:
    """What a `BatchDecoder` knows of a file that it takes.

    Attributes:
        info: as of a `Video`; of an image one frame. times: as ``Video.times``.
        kind: equal for files that are decoded in the same way: what holds for one of them holds for the others.
    """

    info: VideoInfo
    kind: Hashable
    times: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Request:
    """A clip, or an image, that a `BatchDecoder` is to decode.

    Attributes:
        path, kind: of the file. data: its bytes, uint8 ``[N]``. image: it is an image.
        numbers: int64 ``[F]``, ascending; of an image [0].
        box: (top, left, height, width) of the picture, to be scaled to the crop size. flip: and mirrored.
    """

    path: str
    kind: Hashable
    data: np.ndarray
    image: bool
    numbers: np.ndarray
    box: tuple[int, int, int, int]
    flip: bool


class BatchDecoder(ABC):
    """Decodes the clips of a batch at once, in the process that trains, cropped and scaled on the device that decodes.

    `look` is called from several threads, the rest from one.
    """

    @abstractmethod
    def look(self, path: str, kind: str) -> Facts | None:
        """What is known of a video or image (``kind``), or None if it is to be read in the usual way.

        Raises:
            DataError: the file is of no use.
        """

    @abstractmethod
    def decode(self, requests: Sequence[Request], size: int) -> list[torch.Tensor | None]:
        """uint8 ``[3, F, size, size]`` of each request, on the device; None: to be read in the usual way."""

    @abstractmethod
    def doubts(self, request: Request) -> bool:
        """Whether clips of this kind are to be compared with those read in the usual way, since none was right yet."""

    @abstractmethod
    def compare(self, request: Request, clip: torch.Tensor, usual: torch.Tensor) -> bool:
        """Whether a clip shows what ``usual`` does; if not, all of its kind are to be read in the usual way."""

    @abstractmethod
    def close(self) -> None:
        """No more is decoded."""


class Decoder(ABC):
    """Reads videos from files. Stateless or locked: one instance is called from several threads at once.

    Attributes:
        options: how files are read, and limits. `PyAV` keeps to all of them.
    """

    options: ReadOptions = ReadOptions()

    @classmethod
    def objections(cls) -> list[str]:
        """Why it cannot be used on this machine (a library that is missing, say); empty if it can."""
        return []

    def batches(self, device: str, size: int, threads: int) -> BatchDecoder | None:
        """What decodes whole batches of training clips, at most ``size`` at once; None: they are read one by one.

        Args:
            device: of the training, "cpu" or "cuda".
            size: clips of a batch.
            threads: that it may use of the CPU.
        """
        return None

    @abstractmethod
    def open(self, path: str) -> AbstractContextManager[Video]:
        """Open a video for the ``with`` block.

        Raises:
            DataError: the file is missing, empty, damaged or no video, in one line that begins with the path.
        """

    def _open(self, path: str) -> AbstractContextManager[Video]:
        """As `open`; a row store is read by the same code, whatever the decoder."""
        from vjepa_fast.data.decoders.rows import is_rows, open_rows

        return open_rows(path, self.options) if is_rows(path) else self.open(path)

    def probe(self, path: str) -> VideoInfo:
        """What there is to know of a video. Errors as `open`."""
        with self._open(path) as video:
            return video.info

    def read_clip(
        self,
        path: str,
        num_frames: int,
        sampling: Sampling,
        start: str | float = "random",
        generator: np.random.Generator | None = None,
        size: tuple[int, int] | None = None,
    ) -> np.ndarray:
        """One clip, uint8 ``[num_frames, H, W, 3]``; arguments as ``Sampling.indices`` and ``Video.read``.

        Raises:
            DataError: the video cannot be read or is too short.
        """
        drawn = generator.bit_generator.state if generator is not None else None
        with self._open(path) as video:

            def choose(total: int) -> np.ndarray:
                if generator is not None:  # chosen again, a clip is that of a reader who knew the count beforehand
                    generator.bit_generator.state = drawn  # pyright: ignore[reportAttributeAccessIssue]  # numpy's stub
                return sampling.indices(path, total, video.info["fps"], num_frames, start, generator, video.times)

            return _read(video, choose, size)

    def read_video(self, path: str, max_bytes: int) -> WholeVideo | None:
        """All frames; None if they would take more than ``max_bytes``. Errors as `read_clip`."""
        with self._open(path) as video:
            info, claimed = video.info, video.info["frames"]
            if claimed * info["height"] * info["width"] * 3 > max_bytes:
                return None
            return WholeVideo(_read(video, lambda total: np.arange(total), None), info["fps"], claimed, video.times)

    def verify(self, path: str, on_share: Callable[[float], None]) -> None:
        """Decode every frame of a video, as ``Video.verify``."""
        with self._open(path) as video:
            try:
                video.verify(on_share)
            except DataError:
                if not video.recount():
                    raise
                video.verify(on_share)


def _read(video: Video, choose: Callable[[int], np.ndarray], size: tuple[int, int] | None) -> np.ndarray:
    """The frames chosen among the video's; chosen again if there turn out to be fewer."""
    numbers = choose(video.info["frames"])
    try:
        return video.read(numbers, size)
    except DataError:
        if not video.recount():
            raise
    return video.read(choose(video.info["frames"]), size)


class _RowStores(Decoder):
    """What is left without any library: videos that are read by the code of `Decoder` itself."""

    def open(self, path: str) -> NoReturn:
        """As ``Decoder.open``; there is no other kind of video that it could open."""
        raise DataError(f"{path}: cannot be read: no decoder of videos is installed (pip install av)")


def _check(name: str, kind: type[Decoder]) -> None:
    if not (isinstance(kind, type) and issubclass(kind, Decoder)):
        raise TypeError(f"decoder {name!r} must be a class derived from vjepa_fast.data.decoders.Decoder, not {kind!r}")


DECODERS: Registry[type[Decoder]] = Registry("decoder", package="vjepa_fast.data.decoders", check=_check)


def choose_decoder(name: str = "auto", key: str = "data.decoder", options: ReadOptions | None = None) -> Decoder:
    """The decoder of that name; ``auto`` is PyAV (a run may have measured another, `data.fastest`).

    Where PyAV is missing, ``auto`` is another that can be used, or one that reads row stores alone. ``key`` is where
    the name came from.

    Raises:
        ConfigError: there is no such decoder, or it cannot be used here.
    """
    if name == "auto":
        name = next((n for n in (AUTO, *DECODERS) if not DECODERS[n].objections()), "")
    kind = DECODERS.get_named(name, key) if name else _RowStores
    if reasons := kind.objections():
        usable = ", ".join(["auto", *(other for other, k in DECODERS.items() if not k.objections())])
        raise ConfigError(f"{key}: decoder {name} cannot be used here: {'; '.join(reasons)}; usable: {usable}")
    decoder = kind()
    if options is not None:
        decoder.options = options
    return decoder
