"""Files that ask for memory or time without end are refused in one line that names them, and cost little."""

import re
import sys
import zlib

import numpy as np
import pytest

from vjepa_fast.data import load_manifest
from vjepa_fast.data.decoders.image import read_image
from vjepa_fast.data.decoders.index import FrameIndex
from vjepa_fast.data.decoders.index_cache import _Stored
from vjepa_fast.errors import DataError, UserError
from vjepa_fast.files import read_json
from vjepa_fast.models import load_encoder
from vjepa_fast.trainer import checkpoint

from .hostile import write_all
from .isolated import outcome

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits of a process are Linux's here")
NAMES = (
    "claims.pt", "outside.pt", "expanded.pt", "before.pt", "packed.pt", "deep.pt", "laugh.pt", "bytes.pt", "digits.pt",
    "repeated.pt", "claims.safetensors", "head.safetensors", "deep.safetensors",
)  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    return folder, write_all(folder)


@pytest.mark.parametrize("name", NAMES)
def test_checkpoints(files, name):
    folder, words = files
    assert set(words) == set(NAMES)
    for read in (load_encoder, checkpoint.load):
        said = outcome(lambda read=read: read(folder / name))
        assert said.startswith(f"refused: {folder / name}"), said
        assert "\n" not in said and len(said) < 500
        if read is load_encoder:
            assert re.search(words[name], said), said


def test_a_process_with_limits_tells_what_goes_wrong():
    assert outcome(lambda: None) == "read"
    assert outcome(lambda: bytearray(2**32)).startswith("MemoryError")
    assert outcome(lambda: [None for _ in iter(int, 1)], megabytes=4000, seconds=1).startswith("killed")


def test_names_in_an_index_of_weights_stay_in_its_folder(tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    index = tmp_path / "m" / "model.safetensors.index.json"
    for name in ("../other.safetensors", str(tmp_path / "other.safetensors"), 3):
        index.write_text(f'{{"weight_map": {{"w": {name if name == 3 else chr(34) + name + chr(34)}}}}}')
        with pytest.raises(UserError, match="no file beside it"):
            load_encoder(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="not JSON: .*nested too deeply"):
        load_encoder(tmp_path / "m")


def test_deep_json(tmp_path):
    file = tmp_path / "x.json"
    file.write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"x.json: is no JSON .*nested too deeply"):
        read_json(file)


def test_packed_frame_indices_that_unpack_to_any_size(tmp_path):
    deflate, zeros = zlib.compressobj(), bytes(2**20)
    first, again = (deflate.compress(zeros) + deflate.flush(zlib.Z_FULL_FLUSH) for _ in range(2))
    bomb = first + 1023 * again + deflate.compress(b"\0") + deflate.flush()  # 2**30 + 1 zeros, and a wrong checksum
    assert outcome(lambda: FrameIndex.unpack(bomb), megabytes=1400).startswith("ValueError: too large")
    np.savez_compressed(
        tmp_path / "m.npz", key=np.zeros(1, np.uint64), begin=np.array([0, 10**8]), data=np.zeros(10**8, np.uint8)
    )
    (tmp_path / "m.npz").rename(tmp_path / "m.frames")
    assert len(_Stored(tmp_path / "m.frames").key) == 0


def test_patterns_of_more_shards_than_there_are(tmp_path):
    for entry in ("{0..999999}{0..999999}.tar", "{0..99999999999999999999}.tar", "{a,b}" * 40 + ".tar"):
        said = outcome(lambda entry=entry: load_manifest(str(tmp_path / entry)))
        assert said.startswith("refused: ") and "\n" not in said, said


@pytest.mark.parametrize(
    "content",
    [
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EOF\n",
        b"P6 100000 100000 255\n" + bytes(300),
        b"II*\0\x08\0\0\0" + bytes(20),
    ],
    ids=["postscript", "ppm", "tiff"],
)
def test_pictures(tmp_path, content):
    file = tmp_path / "x.png"
    file.write_bytes(content)
    said = outcome(lambda: read_image(file))
    assert said.startswith(f"refused: {file}: ") and "\n" not in said, said


@pytest.mark.parametrize("name", ["film.mp4", "film.ts", "film.mkv"])
@pytest.mark.parametrize("kind", ["concat", "hls", "sdp"])
def test_a_file_that_names_others_is_no_video(manifest, tmp_path, kind, name):
    from vjepa_fast.data import read_clip

    film = load_manifest(manifest).paths[0]
    text = {
        "concat": f"ffconcat version 1.0\nfile '{film}'\n",
        "hls": f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{film}\n#EXT-X-ENDLIST\n",
        "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n"
        "a=rtpmap:96 H264/90000\n",
    }[kind]
    (tmp_path / name).write_text(text)
    read_clip(film, 4, start=0)
    with pytest.raises(DataError, match="unreadable or truncated video"):
        read_clip(str(tmp_path / name), 4, start=0)


def test_frames_that_are_only_listed(manifest, tmp_path):
    """A film whose header lists 2^27 samples of equal size is refused before they are looked at one by one."""
    from vjepa_fast.data import read_clip

    film = load_manifest(manifest).paths[0]
    with open(film, "rb") as file:
        data = bytearray(file.read())
    at = data.index(b"stsz") + 8
    data[at : at + 8] = (1).to_bytes(4, "big") + (2**27).to_bytes(4, "big")
    (tmp_path / "film.mp4").write_bytes(data)
    said = outcome(lambda: read_clip(str(tmp_path / "film.mp4"), 4, start=0), megabytes=9000, seconds=20)
    assert said.startswith("refused: ") and "\n" not in said, said
