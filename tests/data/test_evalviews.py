"""Several views of a video: where clips start, where crops lie, and what short videos give."""

import numpy as np
import pytest

from vjepa_fast.data import Sampling
from vjepa_fast.data.views.augment import centre_view, crop_views
from vjepa_fast.errors import DataError


def test_crops_go_along_the_longer_side():
    wide = crop_views(100, 180, 64, 3)
    assert [(v.top, v.left, v.height, v.width) for v in wide] == [
        (0, 0, 100, 100),
        (0, 40, 100, 100),
        (0, 80, 100, 100),
    ]
    assert [(v.top, v.left) for v in crop_views(180, 100, 64, 3)] == [(0, 0), (40, 0), (80, 0)]
    assert crop_views(100, 180, 64, 1) == [centre_view(100, 180, 64)]


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
    assert np.all(np.diff(frames(300, count=16, spread="whole")) >= 19)
