"""Reading frames of video files with PyAV (the wheel brings FFmpeg), on the CPU.

One decoding thread per call: call it from several threads instead, PyAV releases the interpreter lock. Which frames
there are comes from the `FrameIndex`, never from the header. A decode begins at a key packet from which, by the index,
all later frames can be had, and every frame that comes out is held against the index; where they disagree, the decode
begins earlier, at last at the start of the file.
"""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from vjepa_fast.data.decoders.api import DECODERS, Decoder, Video, VideoInfo
from vjepa_fast.data.decoders.ffmpeg import END, Film, SeekError, open_film
from vjepa_fast.data.decoders.index import FROM_START, FrameIndex
from vjepa_fast.data.decoders.index_cache import INDICES
from vjepa_fast.data.decoders.picture import Painter, shown_size
from vjepa_fast.data.media import ReadOptions
from vjepa_fast.errors import DataError

if TYPE_CHECKING:
    from av.video.frame import VideoFrame

_log = logging.getLogger("vjepa_fast.data")
_WORTH_A_SEEK = 8  # packets that a seek to the next key frame must save


@DECODERS.register("pyav")
class PyAV(Decoder):
    """FFmpeg through PyAV: every container and codec that its wheel reads."""

    @classmethod
    def objections(cls) -> list[str]:
        """PyAV is not installed, or nothing."""
        return [] if importlib.util.find_spec("av") else ["PyAV is not installed (pip install av)"]

    @contextmanager
    def open(self, path: str) -> Iterator[Video]:
        """As ``Decoder.open``; of several video streams the film, not a cover or preview."""
        yield _Video(path, INDICES.get(path, self.options), self.options)


class _Video(Video):
    """A video by its index; the file is open while frames are read."""

    def __init__(self, path: str, index: FrameIndex, options: ReadOptions) -> None:
        self.options, self._disagrees = options, False
        super().__init__(path, _info(index))
        self._use(index)
        options.check_size(path, index.width, index.height)
        if index.interlaced and not options.deinterlace:
            _say_interlaced(path)
        if index.lost and options.corrupt == "refuse":
            raise DataError(
                f"{path}: truncated video, the file ends before the last {index.lost} of {index.packets + index.lost} "
                "frames that it lists; repair it or leave it out"
            )

    def recount(self) -> bool:
        """Whether decoding everything shows other frames than the packets announced, and not because of damage."""
        if not self._disagrees:
            return False
        index = INDICES.correct(self.path, self.options)
        if np.array_equal(index.order, self.index.order) or (index.damaged and self.options.corrupt == "refuse"):
            return False
        self._use(index)
        return True

    def _use(self, index: FrameIndex) -> None:
        self.index, self.info = index, _info(index)
        self.times = None if index.constant else index.times

    def verify(self, on_share: Callable[[float], None]) -> None:
        """Decode everything, one frame at a time."""
        options = replace(self.options, max_seconds=math.inf)
        with open_film(self.path, options) as film:
            numbers = np.arange(self.index.frames)
            number = -1
            try:
                for number, _ in self._frames(film, FROM_START, numbers):
                    if number % 32 == 0:
                        on_share(number / len(numbers))
            except SeekError:
                self._disagrees = True
            if self._disagrees or number != len(numbers) - 1:
                raise DataError(
                    f"{self.path}: truncated or damaged video, frame {number + 1} of {len(numbers)} is missing"
                )

    def read(self, numbers: np.ndarray, size: tuple[int, int] | None) -> np.ndarray:
        self.options.check_clip(self.path, len(numbers), *(size or shown_size(self.index)))
        for runs in self._plans(numbers):
            clip = _Clip(self.path, numbers)
            painter = Painter(self.index, size, self.options.deinterlace)
            with open_film(self.path, self.options) as film:
                if all(self._fill(clip, painter, film, row, run) for row, run in runs):
                    assert clip.pictures is not None, "it is filled"
                    return clip.pictures
        self._disagrees = True
        raise DataError(
            f"{self.path}: truncated or damaged video, frames {int(numbers[0])} to {int(numbers[-1])} of "
            f"{self.index.frames} could not be decoded"
        )

    def _plans(self, numbers: np.ndarray) -> Iterator[list[tuple[int, range]]]:
        """Ways to read these frames, the quickest first: rows of ``FrameIndex.key``, and what to read from each."""
        index, everything = self.index, range(len(numbers))
        rows = index.seek_points(numbers)
        runs, begin, row = [], 0, int(rows[0])
        for i in (np.nonzero(np.diff(rows))[0] + 1).tolist():
            if index.key[rows[i]] > index.order[numbers[i - 1]] + _WORTH_A_SEEK:
                runs.append((row, range(begin, i)))
                begin, row = i, int(rows[i])
        yield [*runs, (row, range(begin, len(numbers)))]
        first = runs[0][0] if runs else row
        if first != FROM_START:
            earlier = index.seek_point(int(index.place[index.key[first]]) - 1)
            yield [(earlier, everything)]
            if earlier != FROM_START:
                yield [(FROM_START, everything)]
        elif runs:
            yield [(FROM_START, everything)]

    def _fill(self, clip: _Clip, painter: Painter, film: Film, row: int, run: range) -> bool:
        """Paint a part of the clip, decoded from a row of ``FrameIndex.key`` on; whether its frames were there."""
        numbers = np.array(clip.numbers[run.start : run.stop])
        done, picture = run.start, None
        try:
            for number, frame in self._frames(film, row, numbers):
                if number < clip.numbers[done]:
                    continue
                picture = painter.paint(frame)
                while done < run.stop and clip.numbers[done] <= number:
                    clip.put(done, picture)
                    done += 1
                if done == run.stop:
                    self._check_rest(film, int(self.index.order[numbers].max()))
                    return True
        except SeekError:
            return False
        if self.options.corrupt == "refuse" or picture is None:
            return False
        for place in range(done, run.stop):
            clip.put(place, picture)
        return True

    def _frames(self, film: Film, row: int, numbers: np.ndarray) -> Iterator[tuple[int, VideoFrame]]:
        """(number, frame) in the order shown, held against the index.

        Raises:
            SeekError: what comes out is not what the index says.
            DataError: a frame is damaged, and damage is refused.
        """
        index, refuse = self.index, self.options.corrupt == "refuse"
        packets = film.from_key(index, row)
        first = 0 if row == FROM_START else int(index.place[index.key[row]])
        if refuse and len(index.gaps) and not index.independent:
            last = int(index.order[numbers].max())
            if len(gaps := index.gaps[(index.gaps > index.order[first]) & (index.gaps < last)]):
                raise DataError(f"{self.path}: damaged video, packet {gaps[0]} of {index.packets} shows no frame")
        wanted: Sequence[int] = range(first, int(numbers[-1]) + 1)
        if index.independent:
            wanted = np.unique(numbers).tolist()
            holds = frozenset(index.order[wanted].tolist())
            packets = ((number, packet) for number, packet in packets if number in holds or packet is None)
        expected, at = index.order[wanted].tolist(), 0
        for number, frame in film.decode(packets):
            if number != expected[at]:
                if at == 0 and row != FROM_START:  # shown before the key frame, and refers to what was before it
                    continue
                if refuse:
                    raise SeekError
                if number not in expected[at:]:
                    continue
                at = expected.index(number, at)
            if refuse and frame.is_corrupt:
                raise self._damaged(wanted[at])
            yield wanted[at], frame
            at += 1
            if at == len(expected):
                return

    def _check_rest(self, film: Film, last: int) -> None:
        """Frames up to packet ``last`` that are decoded and not shown yet: the clip may refer to them."""
        if self.options.corrupt == "refuse" and not self.index.independent:
            for number, frame in film.decode([END]):
                if number < last and frame.is_corrupt:
                    raise self._damaged(int(self.index.place[number]))

    def _damaged(self, number: int) -> DataError:
        return DataError(
            f"{self.path}: damaged video, frame {number} of {self.index.frames} is painted over; "
            "repair it, leave it out, or set data.corrupt: keep"
        )


class _Clip:
    """Pictures of one size, in the order of ``numbers``."""

    def __init__(self, path: str, numbers: np.ndarray) -> None:
        self.path, self.numbers = path, numbers.tolist()
        self.pictures: np.ndarray | None = None

    def put(self, place: int, picture: np.ndarray) -> None:
        if self.pictures is None:
            self.pictures = np.empty((len(self.numbers), *picture.shape), np.uint8)
        elif picture.shape != self.pictures.shape[1:]:
            raise DataError(
                f"{self.path}: the picture changes its size at frame {self.numbers[place]}; convert the video"
            )
        self.pictures[place] = picture


class _Once:
    """Reports the first interlaced film of a process."""

    said = False

    def __call__(self, path: str) -> None:
        if not self.said:
            self.said = True
            _log.warning("%s is interlaced: lines of two moments in one frame; data.deinterlace: true mends that", path)


_say_interlaced = _Once()


def _info(index: FrameIndex) -> VideoInfo:
    height, width = shown_size(index)
    return VideoInfo(frames=index.frames, fps=index.rate, height=height, width=width, codec=index.codec)
