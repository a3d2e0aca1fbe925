"""Real files, good and broken, for the tests of reading."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from vjepa_fast.config.schema import AugmentConfig, Config, DataConfig, RuntimeConfig


@pytest.fixture(scope="session")
def counter_video(tmp_path_factory):
    """40 frames of 32 x 48 whose grey level is 6 x the frame number, at 25 fps, key frames every 12."""
    from vjepa_fast.data.synthetic.write import write_video

    path = tmp_path_factory.mktemp("counter") / "counter.mp4"
    levels = 6 * np.arange(40, dtype=np.uint8)
    write_video(path, np.broadcast_to(levels[:, None, None, None], (40, 32, 48, 3)).copy(), fps=25, crf=1, gop=12)
    return str(path)


def frame_numbers(clip: np.ndarray) -> list[int]:
    """Which frames of ``counter_video`` a clip holds."""
    return np.rint(clip.reshape(len(clip), -1).mean(1) / 6).astype(int).tolist()


@pytest.fixture(scope="session")
def numbers():
    return frame_numbers


@pytest.fixture(scope="session")
def broken(tmp_path_factory, tiny_suites) -> dict[str, str]:
    """One path per way in which a file can be no use as a 16-frame video."""
    import av

    from vjepa_fast.data import load_manifest
    from vjepa_fast.data.synthetic.write import write_image, write_video

    folder = tmp_path_factory.mktemp("broken")
    good = load_manifest(tiny_suites["motion8"]["train"]).paths[0]
    content = Path(good).read_bytes()
    noise = np.random.default_rng(0).integers(0, 256, (16, 64, 64, 3), dtype=np.uint8)
    paths = {
        name: str(folder / f"{name}.mp4")
        for name in ("zero", "truncated", "cut", "garbage", "text", "audio", "short", "disguised", "missing")
    }
    paths["image"] = str(folder / "image.jpg")
    Path(paths["zero"]).touch()
    Path(paths["truncated"]).write_bytes(content[: len(content) // 2])  # the index at the end is gone
    Path(paths["garbage"]).write_bytes(np.random.default_rng(1).bytes(5000))
    Path(paths["text"]).write_text("this is not a video\n" * 50)
    write_video(paths["short"], noise[:10])
    write_image(paths["image"], noise[:1])
    Path(paths["disguised"]).write_bytes(Path(paths["image"]).read_bytes())
    _write_cut(paths["cut"], noise)
    with av.open(paths["audio"], "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        for _ in range(10):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate = 16000
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return paths


def _write_cut(path: str, frames: np.ndarray) -> None:
    """A video with its index in front (as for streaming), so that it opens, but with its second half missing."""
    import av

    with av.open(path, "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=8)
        stream.height, stream.width, stream.pix_fmt = 64, 64, "yuv420p"
        stream.options = {"crf": "18", "bf": "0"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    content = Path(path).read_bytes()
    Path(path).write_bytes(content[: len(content) // 2])


@pytest.fixture
def make_config():
    """``make_config(manifest, ..., batch_size=4, num_workers=2, ...)``: a Config of small clips."""

    def build(*manifests: str, seed: int = 5, aug: AugmentConfig | None = None, **data) -> Config:
        settings = dict(batch_size=4, crop_size=32, dataset_fpcs=(8,)) | data
        return Config(
            data=DataConfig(datasets=tuple(map(str, manifests)), **settings),
            seed=seed,
            data_aug=aug or AugmentConfig(),
            runtime=RuntimeConfig(device="cpu"),
        )

    return build


@pytest.fixture
def write_manifest(tmp_path):
    """``write_manifest(paths, labels)`` -> path of a manifest with absolute paths."""

    def write(paths, labels=None, name="some.csv") -> str:
        labels = labels if labels is not None else [0] * len(paths)
        file = tmp_path / name
        file.write_text("".join(f"{p} {y}\n" for p, y in zip(paths, labels)))
        return str(file)

    return write
