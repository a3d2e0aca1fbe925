"""Which frames a clip takes: steps, starts, spreads, and what short videos give."""

import numpy as np
import pytest

from vjepa_fast.data import Sampling
from vjepa_fast.errors import DataError


def frames(total, start="center", count=4, **sampling):
    return Sampling(**sampling).indices("v.mp4", total, 25.0, count, start, None).tolist()


def test_starts_by_fraction_of_what_fits():
    assert frames(13, 0.5, frame_step=2) == frames(13, frame_step=2) == [3, 5, 7, 9]
    assert frames(13, 0.0, frame_step=2)[0] == 0 and frames(13, 1.0, frame_step=2)[-1] == 12
    for bad in (1.5, -0.1):
        with pytest.raises(DataError, match="float from 0 to 1"):
            frames(13, bad)


def test_short_videos_hold_their_last_frame_where_asked():
    with pytest.raises(DataError, match="has 5 frames"):
        frames(5, frame_step=2)
    assert frames(5, frame_step=2, short="hold") == [0, 2, 4, 4]
    assert frames(7, frame_step=2, short="hold") == frames(7, frame_step=2) == [0, 2, 4, 6]


def test_whole_spans_the_video():
    assert frames(31, spread="whole", frame_step=2) == [0, 10, 20, 30]
    assert frames(2, spread="whole") == [0, 0, 0, 1]
    assert frames(2, spread="whole", short="hold") == [0, 1, 1, 1]  # as the published evaluation reads short ones
    assert frames(31, spread="whole", short="hold") == [0, 10, 20, 30]
    assert np.all(np.diff(frames(300, count=16, spread="whole")) >= 19)


@pytest.mark.parametrize(
    ("fps", "video_fps", "step"),
    [(16, 25.0, 1), (16, 29.97, 1), (10, 29.97, 3), (8, 25.0, 3), (30, 24.0, 1), (12, 24.0, 2), (4, 29.97, 7)],
)
def test_step_of_a_frame_rate(fps, video_fps, step):
    assert Sampling(fps=fps).step(video_fps, 16) == step


def test_published_spread():
    frames = Sampling(2, spread="published").indices("x", 100, 25.0, 16, 10, None)
    assert frames.tolist() == [10, 12, 14, 16, 18, 20, 22, 24, 27, 29, 31, 33, 35, 37, 39, 41]
    assert Sampling(1, spread="published").indices("x", 16, 25.0, 16, "random", None).tolist() == list(range(16))
