"""Batches decoded, cropped and scaled by NVIDIA DALI: by NVDEC where training runs on a GPU, else on the CPU.

The same frames and crop boxes as PyAV's: both are drawn before anything is decoded, from the `FrameIndex`. Pixels
differ a little, since DALI converts colours and scales in its own way: by less than ``_MEAN`` grey levels in the mean
of a clip. The first clips of each kind of file (codec, container, pixel format, colours, order of packets) are compared
with PyAV's; a kind that differs more, or that shows the frames next to them, goes to PyAV, as does what the decoder
refuses. Damage inside of frames is not reported by DALI: only what the index knows of it is refused.

One clip at a time, as evaluation and ``data check`` read, is PyAV's.
"""

from __future__ import annotations

import importlib.util
import logging
import threading
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vjepa_fast.data.decoders.api import DECODERS, BatchDecoder, Facts, Request, VideoInfo
from vjepa_fast.data.decoders.ffmpeg import open_film
from vjepa_fast.data.decoders.image import open_image
from vjepa_fast.data.decoders.index import FrameIndex
from vjepa_fast.data.decoders.index_cache import INDICES
from vjepa_fast.data.decoders.plain import why_not_plain
from vjepa_fast.data.decoders.pyav import PyAV
from vjepa_fast.data.decoders.rows import is_rows
from vjepa_fast.data.media import check_file, one_line, suffix_of
from vjepa_fast.data.members import open_file

if TYPE_CHECKING:
    import torch

_log = logging.getLogger("vjepa_fast.data")
_CODECS = {"cpu": ("vp8", "vp9", "mjpeg"), "mixed": ("h264", "hevc", "mpeg4", "vp8", "vp9", "mjpeg")}
_PIXELS = ("yuv420p", "yuvj420p")  # of all hardware; 10 bits, 4:2:2 and 4:4:4 are PyAV's
_LARGEST = 256_000_000  # bytes of a file, which is held in memory as a whole
_MEAN = 5.0  # grey levels, mean over a clip, that DALI may be off
_OTHER = "DALI shows other frames or colours"
_NEEDS = ("nvidia.dali", "optree", "astunparse", "gast", "six", "makefun", "libcst", "nvtx")


@DECODERS.register("dali")
class Dali(PyAV):
    """NVIDIA DALI for batches of training clips: NVDEC on a GPU, else VP8, VP9 and MJPEG on the CPU; the rest PyAV."""

    @classmethod
    def objections(cls) -> list[str]:
        """PyAV, DALI or one of the packages that DALI needs is missing."""
        missing = [name for name in _NEEDS if not _found(name)]
        if "nvidia.dali" in missing:
            return [*PyAV.objections(), "DALI is not installed (pip install nvidia-dali-cuda130)"]
        return [*PyAV.objections(), *([f"DALI needs {', '.join(missing)} (pip install them)"] if missing else [])]

    def batches(self, device: str, size: int, threads: int) -> BatchDecoder:
        """As ``Decoder.batches``."""
        return DaliBatches(self, "mixed" if device == "cuda" else "cpu", size, max(1, threads))


def _found(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # not even the package that it would be in
        return False


class DaliBatches(BatchDecoder):
    """As `BatchDecoder`; ``device`` is "mixed" (bytes on the host, pictures on the GPU) or "cpu".

    Attributes:
        refused: number of files that went to PyAV, by reason.
    """

    def __init__(self, decoder: PyAV, device: str, size: int, threads: int) -> None:
        import torch

        self.decoder, self.device, self.size, self.threads = decoder, device, size, threads
        self._gpu = torch.cuda.current_device() if device == "mixed" else None
        self.refused: Counter[str] = Counter()
        self._usual: set[str] = set()  # files to be read in the usual way
        self._kinds: dict[str, Hashable] = {}  # of the files seen
        self._verdict: dict[Hashable, bool] = {}  # kinds compared
        self._pipes: dict[tuple[bool, int], Any] = {}
        self._lock = threading.Lock()

    def look(self, path: str, kind: str) -> Facts | None:
        """As ``BatchDecoder.look``; files that are not for DALI are counted, the first for each reason is logged."""
        if path in self._usual:
            return None
        facts = self._image(path) if kind == "image" else self._video(path)
        if isinstance(facts, Facts) and self._verdict.get(facts.kind, True):
            return facts
        self._refuse(path, facts if isinstance(facts, str) else _OTHER)
        return None

    def _refuse(self, path: str, reason: str) -> None:
        with self._lock:
            if path in self._usual:
                return
            self._usual.add(path)
            self.refused[reason] += 1
            first = self.refused[reason] == 1
        if first:
            _log.warning("%s: not for DALI (%s); it and others like it are read by PyAV on the CPU", path, reason)

    def _video(self, path: str) -> Facts | str:
        if is_rows(path):
            return "rows are read as they lie"
        with self.decoder.open(path) as video:
            info, times = video.info, video.times
        index = INDICES.get(path, self.decoder.options)
        if index.codec not in _CODECS[self.device]:
            return f"{index.codec} is not decoded {'by the GPU' if self.device == 'mixed' else 'on the CPU'}"
        if reason := why_not_plain(path, index, self.decoder.options):
            return reason
        kind = self._kinds.get(path)
        if kind is None:
            kind = self._kind(path, index)
            if isinstance(kind, str):
                return kind
            self._kinds[path] = kind
        return Facts(info, kind, times)

    def _kind(self, path: str, index: FrameIndex) -> Hashable:
        """What the way of decoding depends on; a text says why it is not for DALI."""
        with open_film(path, self.decoder.options) as film:
            stream, codec = film.stream, film.stream.codec_context
            if len(film.container.streams.video) != 1:
                return "several video streams"
            if film.container.size > _LARGEST:
                return f"over {_LARGEST // 1_000_000} MB"
            if codec.pix_fmt not in _PIXELS:
                return f"{codec.pix_fmt} pictures"
            reordered = bool((np.diff(index.order) < 0).any())
            colours = codec.pix_fmt, int(codec.colorspace), int(codec.color_range)
            return (
                index.codec,
                film.container.format.name,
                stream.type,
                colours,
                reordered,
                index.packets > index.frames,
            )

    def _image(self, path: str) -> Facts | str:

        check_file(path)
        if not _found("nvidia.nvimgcodec"):
            return "images need nvidia-nvimgcodec-cu13"
        if suffix_of(path) not in (".jpg", ".jpeg", ".jfif"):
            return "no JPEG"
        try:
            with open_file(path) as file, open_image(file) as image:
                upright = image.getexif().get(0x0112, 1) == 1
                form, mode, (width, height) = image.format, image.mode, image.size
        except Exception as error:  # the usual way says what is wrong
            return f"unreadable: {type(error).__name__}"
        self.decoder.options.check_size(path, width, height)
        if form != "JPEG" or mode not in ("RGB", "L") or not upright or not _complete(path):
            return "no upright JPEG in colour or grey"
        info = VideoInfo(frames=1, fps=1.0, height=height, width=width, codec="jpeg")
        return Facts(info, ("jpeg", mode))

    def decode(self, requests: Sequence[Request], size: int) -> list[torch.Tensor | None]:
        """As ``BatchDecoder.decode``; where DALI refuses one of them, each is decoded alone."""
        good = [request for request in requests if self._verdict.get(request.kind, True)]
        clips = dict(zip(map(id, good), self._decode(good, size))) if good else {}
        return [clips.get(id(request)) for request in requests]

    def _decode(self, requests: list[Request], size: int) -> list[torch.Tensor] | list[torch.Tensor | None]:
        try:
            return self._run(requests, size)
        except Exception as error:  # of any type; the pipeline cannot be used after it
            self._pipes.clear()
            if len(requests) > 1:
                return [self._decode([request], size)[0] for request in requests]
            self._refuse(requests[0].path, f"DALI refuses it: {_reason(error)}")
            return [None]

    def _run(self, requests: list[Request], size: int) -> list[torch.Tensor]:
        import torch

        image = requests[0].image
        pipe = self._pipes.get((image, size))
        if pipe is None:
            pipe = self._pipes[image, size] = _pipeline(image, size, self._gpu, self.size, self.threads)
        pipe.feed_input("data", [r.data for r in requests])
        if not image:
            pipe.feed_input("numbers", [r.numbers.astype(np.int32) for r in requests])
        boxes = np.array([r.box for r in requests], np.int32)
        pipe.feed_input("corner", list(boxes[:, :2]))
        pipe.feed_input("shape", list(boxes[:, 2:]))
        pipe.feed_input("flip", [np.array(r.flip, np.int32) for r in requests])
        (out,) = pipe.run()  # returns when the device is done
        clips = torch.from_dlpack(out.as_tensor()).clone()  # the next run uses this memory again
        if clips.is_cuda:
            torch.cuda.current_stream(clips.device).synchronize()
        return list(clips)

    def doubts(self, request: Request) -> bool:
        """As ``BatchDecoder.doubts``."""
        return not self._verdict.get(request.kind, False)

    def compare(self, request: Request, clip: torch.Tensor, usual: torch.Tensor) -> bool:
        """As ``BatchDecoder.compare``: by the mean difference, and that to the frames beside."""
        if not self._verdict.get(request.kind, True):  # found out by another clip of the same batch
            return False
        ours, theirs = clip.cpu().float(), usual.float()
        off, beside = float((ours - theirs).abs().mean()), float("inf")
        if ours.shape[1] > 1:
            beside = float((ours[:, 1:] - theirs[:, :-1]).abs().mean())
            beside = min(beside, float((ours[:, :-1] - theirs[:, 1:]).abs().mean()))
        if off > _MEAN or beside < 0.7 * off:
            self._verdict[request.kind] = False
            self._refuse(request.path, _OTHER)
            return False
        if beside > 1.4 * off + 0.5:  # it moves, so that frames beside these would have been noticed
            self._verdict[request.kind] = True
        return True

    def close(self) -> None:
        """Free the pipelines; logs how many files went to PyAV."""
        self._pipes.clear()
        if self.refused:
            reasons = ", ".join(f"{reason}: {number}" for reason, number in self.refused.most_common())
            _log.info("DALI left %d files to PyAV (%s)", sum(self.refused.values()), reasons)


def _complete(path: str) -> bool:
    """Whether a JPEG ends as it should."""
    with open_file(path) as file:
        file.seek(-2, 2)
        return file.read() == b"\xff\xd9"


def _reason(error: Exception) -> str:
    """The line of DALI's long message that says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if "Assert" in line or "Unsupported" in line), one_line(error))[:200]


def _pipeline(image: bool, size: int, gpu: int | None, batch: int, threads: int) -> Any:
    """Built; takes "data", "corner" and "shape" of the box, "flip", and of videos the "numbers" of the frames."""
    from nvidia.dali import fn, types
    from nvidia.dali.pipeline import Pipeline

    device = "cpu" if gpu is None else "mixed"
    pipe = Pipeline(
        batch_size=batch,
        num_threads=threads,
        device_id=gpu,
        prefetch_queue_depth=1,
        exec_dynamic=True,
        set_affinity=False,
    )
    with pipe:
        data = fn.external_source(name="data", dtype=types.UINT8, ndim=1)
        corner, shape = (fn.external_source(name=name, dtype=types.INT32, ndim=1) for name in ("corner", "shape"))
        flip = fn.external_source(name="flip", dtype=types.INT32, ndim=0)
        if image:
            pictures = fn.decoders.image_slice(data, corner, shape, axes=[0, 1], device=device, output_type=types.RGB)
        else:
            numbers = fn.external_source(name="numbers", dtype=types.INT32, ndim=1)
            pictures = fn.decoders.video(data, frames=numbers, device=device, affine=False)
            pictures = fn.slice(pictures, corner, shape, axes=[1, 2])
        pictures = fn.resize(pictures, size=[size, size], interp_type=types.INTERP_LINEAR, antialias=True)
        pictures = fn.flip(pictures, horizontal=flip)
        if image:
            pictures = fn.expand_dims(pictures, axes=[0], new_axis_names="F")
        pipe.set_outputs(fn.transpose(pictures, perm=[3, 0, 1, 2]))
    pipe.build()
    return pipe
