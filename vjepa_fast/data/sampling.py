"""Which frames of a video make a clip."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from vjepa_fast.errors import DataError


@dataclass(frozen=True)
class Sampling:
    """Which frames make a clip: at most one of the first three, a step of 1 if none.

    Attributes:
        frame_step: frames from one to the next.
        fps: frames per second to read at: the step is max(1, ceil(video fps) // fps), as published.
        duration: seconds that a clip spans: the step is max(1, int(duration * ceil(video fps) / num_frames)).
            Where the rate of a video varies, both go by time (see `indices`); ``frame_step`` always counts frames.
        spread: "even": start + i * step. "published": the published code's integers of a linspace over
            num_frames * step frames, which runs up to a step ahead of that. "whole": evenly over the whole video,
            first and last frame included, whatever the step and the start.
        short: what happens to a video shorter than the clip: "refuse", or "hold", which repeats its last frame. A video
            of fewer frames than a clip over the "whole" of it repeats frames all along, or under "hold" its last one.
    """

    frame_step: int | None = None
    fps: int | None = None
    duration: float | None = None
    spread: str = "even"
    short: str = "refuse"

    def __post_init__(self) -> None:
        options = {"frame_step": self.frame_step, "fps": self.fps, "duration": self.duration}
        given = {name: value for name, value in options.items() if value is not None}
        texts = [f"{name} {value}" for name, value in given.items()]
        if len(given) > 1:
            raise DataError(f"frame sampling: give one of frame_step, fps and duration, not {' and '.join(texts)}")
        if any(value <= 0 for value in given.values()):
            raise DataError(f"frame sampling: {texts[0]} must be positive")

    def step(self, video_fps: float, num_frames: int) -> int:
        """Frames from one frame of a clip to the next, in a video of ``video_fps`` frames per second."""
        rate = math.ceil(video_fps - 1e-9)
        if self.fps is not None:
            return max(1, rate // self.fps)
        if self.duration is not None:
            return max(1, int(self.duration * rate / num_frames))
        return self.frame_step or 1

    def indices(
        self,
        path: str,
        total: int,
        video_fps: float,
        num_frames: int,
        start: str | float,
        generator: np.random.Generator | None,
        times: np.ndarray | None = None,
    ) -> np.ndarray:
        """Frame numbers of one clip.

        Args:
            path: of the video, for the error text.
            total: frames of the video.
            video_fps: its frames per second.
            num_frames: frames of the clip.
            start: "random" (uniform over all that fit), "center", the first frame's number (an int), or a float from
                0.0 (the video's beginning) to 1.0 (the clip ends with the video).
            generator: draws a random start.
            times: float64 ``[total]``, seconds of each frame where the rate varies: then ``fps`` and ``duration`` mean
                frames nearest to times 1 / fps or duration / num_frames apart, but for the published spread.

        Returns:
            int64 ``[num_frames]``, ascending; with ``times`` a frame may come again.

        Raises:
            DataError: the video is too short, or ``start`` is out of range.
        """
        if self.spread == "whole" and total > 0:
            if self.short == "hold" and total < num_frames:
                return np.minimum(np.arange(num_frames, dtype=np.int64), total - 1)
            return np.linspace(0, total - 1, num_frames).astype(np.int64)
        if times is not None and self.spread == "even" and (self.fps or self.duration):
            spacing = 1 / self.fps if self.fps else (self.duration or 0) / num_frames
            return self._by_time(path, times[:total], spacing, num_frames, start, generator)
        step = self.step(video_fps, num_frames)
        if self.short == "hold" and 0 < total < (num_frames - 1) * step + 1:
            return np.minimum(step * np.arange(num_frames, dtype=np.int64), total - 1)
        span = num_frames * step if self.spread == "published" else (num_frames - 1) * step + 1
        room = total - span
        if room < 0:
            raise DataError(
                f"{path}: has {total} frames, a clip of {num_frames} frames at step {step} needs {span}; "
                "ask for fewer frames or a smaller step, or leave the video out"
            )
        first = _first(path, room, start, generator)
        if self.spread == "published":
            return np.clip(np.linspace(first, first + span, num_frames), first, first + span - 1).astype(np.int64)
        return first + step * np.arange(num_frames, dtype=np.int64)

    def _by_time(
        self,
        path: str,
        times: np.ndarray,
        spacing: float,
        num_frames: int,
        start: str | float,
        generator: np.random.Generator | None,
    ) -> np.ndarray:
        """Frames nearest to times ``spacing`` seconds apart, from a frame from which on the clip fits."""
        span = (num_frames - 1) * spacing
        room = int(np.searchsorted(times, times[-1] - span + 1e-6, side="right")) - 1
        if room < 0 and self.short == "refuse":
            raise DataError(
                f"{path}: lasts {times[-1]:.2f} s, {num_frames} frames {spacing:.3g} s apart need {span:.2f}; "
                "ask for fewer frames or a smaller step, or leave the video out"
            )
        wanted = times[_first(path, room, start, generator) if room >= 0 else 0] + spacing * np.arange(num_frames)
        between = (times[1:] + times[:-1]) / 2
        return np.searchsorted(between, wanted - 1e-6).astype(np.int64)


def _first(path: str, room: int, start: str | float, generator: np.random.Generator | None) -> int:
    """The first frame of a clip, of those from 0 to ``room``; ``start`` as in ``Sampling.indices``."""
    if start == "random":
        generator = generator if generator is not None else np.random.default_rng()
        return int(generator.integers(room + 1))
    if start == "center":
        return room // 2
    if isinstance(start, float) and 0.0 <= start <= 1.0:
        return int(room * start)
    if isinstance(start, int | np.integer) and 0 <= start <= room:
        return int(start)
    raise DataError(
        f"{path}: start {start!r} must be random, center, a float from 0 to 1 or a frame number from 0 to {room}"
    )
