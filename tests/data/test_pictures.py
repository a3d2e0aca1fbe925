"""Frames and images as people see them: turned, with square pixels, without combs, whatever their pixel format."""

import itertools

import numpy as np
import pytest
from PIL import Image, ImageOps

from benchmarks.films import encode, paint, plain_decode
from vjepa_fast.data import probe_video, read_clip, read_image
from vjepa_fast.data.decoders import choose_decoder, pyav
from vjepa_fast.data.decoders.picture import turned
from vjepa_fast.data.media import ReadOptions
from vjepa_fast.errors import DataError


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return encode(tmp_path_factory.mktemp("plain") / "a.mp4", "libx264", {"bf": "2"}, numbers=range(6))


@pytest.mark.parametrize(
    ("degrees", "hflip", "vflip"), list(itertools.product((0, 90, 180, 270), (False, True), (False, True)))
)
def test_display_matrices(tmp_path, plain, degrees, hflip, vflip):
    path = encode(
        tmp_path / "a.mp4",
        "libx264",
        {"bf": "2"},
        numbers=range(6),
        change=lambda s: s.set_display_rotation(degrees, hflip=hflip, vflip=vflip),
    )
    # as FFmpeg's own player does it: the picture is turned by the matrix, corner by corner
    import av

    with av.open(str(path)) as film:
        frame = next(film.decode(video=0))
        data = frame.side_data.get("DISPLAYMATRIX")
        upright = np.eye(2) if data is None else np.frombuffer(bytes(data), "<i4").reshape(3, 3)[:2, :2] / 65536
        coded = frame.to_ndarray(format="rgb24")
    height, width, _ = coded.shape
    at = np.stack(np.meshgrid(np.arange(width), np.arange(height)), -1) @ np.rint(upright)  # x and y of each pixel
    at = (at - at.min((0, 1))).astype(int)
    want = np.zeros((*at.max((0, 1))[::-1] + 1, 3), np.uint8)
    want[at[..., 1], at[..., 0]] = coded
    clip = read_clip(path, 2, start=0)
    assert np.array_equal(clip[0], want)
    assert (probe_video(path)["height"], probe_video(path)["width"]) == clip.shape[1:3]
    assert read_clip(path, 2, start=0, size=(20, 30)).shape == (2, 20, 30, 3)


def test_other_angles_are_left_alone(tmp_path, plain):
    path = encode(
        tmp_path / "a.mp4", "libx264", {"bf": "2"}, numbers=range(6), change=lambda s: s.set_display_rotation(30)
    )
    assert np.array_equal(read_clip(path, 2, start=0), read_clip(plain, 2, start=0))
    assert turned(np.zeros((4, 6, 3)), [0, 1, -1, 0]).shape == (6, 4, 3)


def test_interlaced_frames(tmp_path, caplog, monkeypatch):
    """Two moments in one frame: lines of both as they are, or the first moment alone (here the lower lines)."""
    import av

    levels = np.zeros((4, 48, 64, 3), np.uint8)
    levels[:, 1::2] = 200
    path = str(tmp_path / "a.mpg")
    with av.open(path, "w") as out:
        stream = out.add_stream("mpeg2video", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.options = {"flags": "+ilme+ildct", "qmin": "1", "qmax": "2"}
        for picture in levels:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        out.mux(stream.encode())
    monkeypatch.setattr(pyav, "_say_interlaced", pyav._Once())
    comb = read_clip(path, 2, start=1)
    assert np.abs(np.diff(comb.astype(int), axis=1)).mean() > 150 and "interlaced" in caplog.text
    smooth = choose_decoder(options=ReadOptions(deinterlace=True)).read_video(path, 10**9).frames
    assert smooth.shape == (4, 48, 64, 3) and np.abs(np.diff(smooth.astype(int), axis=1)).max() < 20
    assert smooth.mean() > 180


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    path = tmp_path / "a.jpg"
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(paint(5)).save(path, exif=exif, quality=95)
    with Image.open(path) as image:
        assert np.array_equal(read_image(path), np.array(ImageOps.exif_transpose(image)))
    assert read_image(path).shape == ((64, 48, 3) if orientation > 4 else (48, 64, 3))


GREY = paint(5)[..., 0]
CLEAR = np.dstack([paint(5), np.where(np.arange(64) < 32, 255, 0) * np.ones((48, 1))]).astype(np.uint8)


@pytest.mark.parametrize(
    ("name", "image", "want"),
    [
        ("grey.png", Image.fromarray(GREY), GREY),
        ("grey16.png", Image.fromarray(GREY.astype(np.uint16) * 257), GREY),
        ("grey16.tif", Image.fromarray(GREY.astype(np.uint16) * 257), GREY),
        ("grey32.tif", Image.fromarray(GREY.astype(np.int32) * 257), GREY),
        ("part.tif", Image.fromarray((GREY / 255).astype(np.float32)), GREY),
        ("level.tif", Image.fromarray(GREY.astype(np.float32)), GREY),
        ("bits.png", Image.fromarray(GREY > 100), np.where(GREY > 100, 255, 0)),
        ("palette.png", Image.fromarray(paint(5)).convert("P", palette=Image.Palette.ADAPTIVE), paint(5)),
        ("palette.bmp", Image.fromarray(GREY).convert("P"), GREY),
        ("clear.png", Image.fromarray(CLEAR), np.where(CLEAR[..., 3:] > 0, CLEAR[..., :3], 255)),
        ("clear.webp", Image.fromarray(CLEAR), np.where(CLEAR[..., 3:] > 0, CLEAR[..., :3], 255)),
        ("la.png", Image.fromarray(CLEAR).convert("LA"), np.where(CLEAR[..., 3:] > 0, CLEAR[..., :3], 255)),
        ("cmyk.jpg", Image.fromarray(paint(5)).convert("CMYK"), paint(5)),
        ("cmyk.tif", Image.fromarray(paint(5)).convert("CMYK"), paint(5)),
        ("plain.webp", Image.fromarray(paint(5)), paint(5)),
    ],
)
def test_pixel_formats_of_images(tmp_path, name, image, want):
    path = tmp_path / name
    image.save(path, **({"quality": 100} if path.suffix in (".jpg", ".webp") else {}))
    got = read_image(path)
    want = np.broadcast_to(want if want.ndim == 3 else want[..., None], (48, 64, 3))
    assert got.shape == want.shape and got.dtype == np.uint8
    assert np.abs(got.astype(int) - want).mean() < 3


def test_huge_images_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    Image.fromarray(paint(5)).save(path)
    monkeypatch.setattr(Image.Image, "load", None)
    with pytest.raises(DataError, match="64 x 48 pixels are over data.max_pixels 3000"):
        read_image(path, ReadOptions(max_pixels=3000))


def test_every_pixel_format_of_films_is_upright_rgb(tmp_path):
    for fmt in ("yuv420p", "yuv444p", "yuv420p10le"):
        path = encode(tmp_path / f"{fmt}.mkv", "libx264", {"crf": "4"}, fmt=fmt, numbers=range(3))
        clip = read_clip(path, 2, start=1)
        assert np.array_equal(clip, np.stack(plain_decode(path)[1:3]))
        assert np.abs(clip[0].astype(int) - paint(1)).mean() < 3
