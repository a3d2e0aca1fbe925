"""Clips per second of reading, by decoder and by kind of film.

    python benchmarks/bench_data.py                                             # prints
    python benchmarks/bench_data.py --json benchmarks/results/data.json         # and records anew
    python benchmarks/bench_data.py --page docs/decoders.md                     # the recorded ones as tables

Films are drawn: 320 x 240, and one of 854 x 480 of which a copy is made as for training: short side 256, every second
frame, H.264 with a key frame every 16 frames and ``tune fastdecode``. Clips of 16 frames are read at random starts,
the same for all. *Frames* are decoded pictures as an array; *batches* are what training reads, cropped and scaled to
224. "torchcodec alone" and "decord" are those libraries as one calls them, one decoding thread for each clip. Beside
clips per second by the clock, each row has the processor time of a clip, which other load hardly changes.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch

from vjepa_fast.config.schema import Config, DataConfig, RuntimeConfig
from vjepa_fast.data import ClipLoader, Sampling, read_clip
from vjepa_fast.data.decoders import DECODERS, choose_decoder, index_of
from vjepa_fast.files import write_json, write_text

BEGIN, END = "<!-- data bench -->\n", "<!-- end of data bench -->"
RESULTS = Path(__file__).parent / "results" / "data.json"
FRAMES, CLIP, FILMS = 240, 16, 2
SMALL, LARGE = (320, 240), (854, 480)
# kind -> suffix, encoder, options, pixel format, size
KINDS: dict[str, tuple[str, str, dict[str, str], str, tuple[int, int]]] = {
    "H.264, key frame every 12": (".mp4", "libx264", {"g": "12", "preset": "veryfast"}, "yuv420p", SMALL),
    "H.264, key frame every 250": (".mp4", "libx264", {"g": "250", "preset": "veryfast"}, "yuv420p", SMALL),
    "MPEG-4, AVI": (".avi", "mpeg4", {"g": "250", "b": "800k"}, "yuv420p", SMALL),
    "VP9": (
        ".webm",
        "libvpx-vp9",
        {"g": "128", "b": "400k", "cpu-used": "8", "deadline": "realtime"},
        "yuv420p",
        SMALL,
    ),
    "MJPEG": (".avi", "mjpeg", {"qmin": "4", "qmax": "4"}, "yuvj420p", SMALL),
    "H.264, 854 x 480": (".mp4", "libx264", {"g": "250", "preset": "veryfast"}, "yuv420p", LARGE),
}
SOURCE, COPY = "H.264, 854 x 480", "its converted copy"
FAST = {"g": "16", "keyint_min": "16", "preset": "fast", "tune": "fastdecode", "crf": "23", "bf": "0"}

Reader = Callable[[str, np.ndarray], np.ndarray]


def draw(seed: int, size: tuple[int, int]) -> Iterator[np.ndarray]:
    """Frames of a moving texture with some noise, uint8 ``[H, W, 3]``."""
    generator = np.random.default_rng(seed)
    width, height = size
    large = generator.integers(0, 256, (height // 8 + 64, width // 8 + 64, 3), dtype=np.uint8)
    large = np.asarray(torch.nn.functional.interpolate(
        torch.from_numpy(large).permute(2, 0, 1)[None].float(), scale_factor=8, mode="bicubic"
    )[0].permute(1, 2, 0).clamp(0, 255).byte())  # fmt: skip
    noise = generator.integers(0, 12, (height + 16, width + 16, 1), dtype=np.uint8)
    for i in range(FRAMES):
        x, y = i % 200, int(60 + 50 * np.sin(i / 20))
        dx, dy = generator.integers(0, 16, 2)
        picture = large[y : y + height, x : x + width] // 16 * 15 + noise[dy : dy + height, dx : dx + width]
        yield np.ascontiguousarray(picture)


def write(
    path: Path, frames: Iterator[np.ndarray], rate: Fraction, codec: str, options: dict[str, str], fmt: str
) -> str:
    """A film of these frames."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=rate, options=options)
        for i, frame in enumerate(frames):
            if not i:
                stream.height, stream.width, stream.pix_fmt = *frame.shape[:2], fmt
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(stream.encode())
    return str(path)


def convert(path: str, to: Path) -> str:
    """The copy for training: every second frame, short side 256."""
    width, height = LARGE
    size = (256, round(width * 256 / height / 2) * 2)
    frames = read_clip(path, FRAMES // 2, 2, start=0, size=size)
    return write(to, iter(frames), Fraction(25, 2), "libx264", FAST, "yuv420p")


def films(folder: Path, only: str) -> dict[str, list[str]]:
    """Paths by kind, of those kinds that have this text in their names."""
    made: dict[str, list[str]] = {}
    for kind, (suffix, codec, options, fmt, size) in KINDS.items():
        if only not in kind:
            continue
        names = [folder / f"{len(made)}-{i}{suffix}" for i in range(FILMS)]
        made[kind] = [write(p, draw(i, size), Fraction(25), codec, options, fmt) for i, p in enumerate(names)]
    if SOURCE in made:
        made[COPY] = [convert(path, folder / f"copy-{i}.mp4") for i, path in enumerate(made[SOURCE])]
    return made


def torchcodec_alone(path: str, numbers: np.ndarray) -> np.ndarray:
    """As one calls torchcodec."""
    from torchcodec.decoders import VideoDecoder

    film = VideoDecoder(path, dimension_order="NHWC", num_ffmpeg_threads=1)
    return film.get_frames_at(numbers.tolist()).data.numpy()


def decord(path: str, numbers: np.ndarray) -> np.ndarray:
    """As one calls decord, or its successor decord2."""
    from decord import VideoReader, cpu

    return VideoReader(path, ctx=cpu(0), num_threads=1).get_batch(numbers.tolist()).asnumpy()


def readers() -> dict[str, Reader]:
    """Every way of reading frames that can be used here."""
    found: dict[str, Reader] = {}
    for name in ("pyav", "torchcodec"):
        if not DECODERS[name].objections():
            decoder = choose_decoder(name)
            found[name] = lambda path, n, d=decoder: d.read_clip(path, len(n), Sampling(int(n[1] - n[0])), int(n[0]))
    if "torchcodec" in found:
        found["torchcodec alone"] = torchcodec_alone
    if importlib.util.find_spec("decord"):
        found["decord"] = decord
    return found


class Watch:
    """Counts clips until the time is over."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.clips = seconds, 0
        self.begin, self.cpu = time.perf_counter(), time.process_time()

    def goes_on(self) -> bool:
        """Whether there is time left."""
        return time.perf_counter() - self.begin < self.seconds

    def row(self) -> dict[str, float]:
        """Clips per second, and milliseconds of processor time for one."""
        spent, cpu = time.perf_counter() - self.begin, time.process_time() - self.cpu
        return {"clips_per_s": round(self.clips / spent, 1), "cpu_ms": round(1e3 * cpu / self.clips, 2)}


def frames_row(paths: list[str], step: int, threads: int, read: Reader, seconds: float) -> dict[str, float]:
    """Clips per second, and the share of six clips that are PyAV's frames."""
    generator = np.random.default_rng(0)
    totals = {path: index_of(path).frames for path in paths}

    def clip(i: int) -> tuple[str, np.ndarray]:
        path = paths[i % len(paths)]
        first = int(generator.integers(totals[path] - (CLIP - 1) * step))
        return path, first + step * np.arange(CLIP)

    tried = [clip(i) for i in range(6 if threads == 1 else 1)]
    right = [np.abs(read(p, n) - read_clip(p, CLIP, step, start=int(n[0])).astype(float)).mean() < 5 for p, n in tried]
    with ThreadPoolExecutor(threads) as pool:
        watch = Watch(seconds)
        while watch.goes_on():
            work = [clip(i) for i in range(2 * threads)]
            watch.clips += len(list(pool.map(lambda job: len(read(*job)), work)))
        return {**watch.row(), "right": float(np.mean(right))}


def batches_row(paths: list[str], step: int, threads: int, name: str, seconds: float) -> dict[str, float]:
    """Clips per second of the loader; none where the decoder would only hand them on to PyAV."""
    with tempfile.TemporaryDirectory() as folder:
        manifest = Path(folder, "films.csv")
        manifest.write_text("".join(f"{path} 0\n" for path in paths * 8))
        data = DataConfig(
            datasets=(str(manifest),), dataset_fpcs=(CLIP,), frame_sample_rate=step, batch_size=4, crop_size=224,
            num_workers=threads, decoder=name,
        )  # fmt: skip
        with ClipLoader(Config(data=data, runtime=RuntimeConfig(device="auto"))) as loader:
            if loader._batches is not None and loader._batches.look(paths[0], "video") is None:
                return {}
            next(loader)
            watch = Watch(seconds)
            while watch.goes_on():
                watch.clips += len(next(loader).groups[0].clip)
            return watch.row()


def measure(seconds: float, only: str) -> dict[str, Any]:
    """All rows."""
    rows: list[dict[str, Any]] = []

    def add(row: dict[str, Any], figures: dict[str, float]) -> None:
        if figures:
            rows.append({**row, **figures})
            print(*rows[-1].values(), sep=" | ", flush=True)

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        made = films(Path(folder), only)
        print(f"films written in {time.perf_counter() - begin:.0f} s", flush=True)
        for kind, paths in made.items():
            steps = (1,) if kind == COPY else (2,) if kind == SOURCE else (2, 1)
            for step, threads in itertools.product(steps, (1, 2)):
                for name, read in readers().items():
                    row = {"what": "frames", "film": kind, "step": step, "threads": threads, "decoder": name}
                    add(row, frames_row(paths, step, threads, read, seconds))
            for name, threads in itertools.product(("pyav", "torchcodec", "torchcodec-cuda", "dali"), (1, 2)):
                if not DECODERS[name].objections():
                    row = {"what": "batches", "film": kind, "step": steps[0], "threads": threads, "decoder": name}
                    add(row, batches_row(paths, steps[0], threads, name, seconds))
    return {"machine": machine(), "rows": rows}


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    names = ("av", "torchcodec", "decord2", "decord", "nvidia-dali-cuda130", "torch")
    packages = {name: found for name in names if (found := _version(name))}
    return {"cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1), "gpu": gpu, "packages": packages}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def page(text: str, result: dict[str, Any]) -> str:
    """The text of a page with the tables of a result between the marks."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + tables(result) + END + rest.split(END)[1]


def tables(result: dict[str, Any]) -> str:
    """Both tables in Markdown."""
    m = result["machine"]
    packages = ", ".join(f"{name} {number}" for name, number in m["packages"].items())
    lines = [
        f"{m['cores']} cores, load {m['load']} before, {m['gpu'] or 'no GPU'}; {packages}. Clips per second by the"
    ]
    lines += ["clock on 1 and 2 threads, and milliseconds of processor time of a clip:", ""]
    for what in ("frames", "batches"):
        rows = [row for row in result["rows"] if row["what"] == what]
        decoders = list(dict.fromkeys(row["decoder"] for row in rows))
        lines += [f"| {what} of | step | {' | '.join(decoders)} |", "|---|---|" + "---|" * len(decoders)]
        cells: dict[tuple[str, int], dict[str, list[dict[str, Any]]]] = {}
        for row in rows:
            cells.setdefault((row["film"], row["step"]), {}).setdefault(row["decoder"], []).append(row)
        for (film, step), cell in cells.items():
            lines.append(f"| {film} | {step} | {' | '.join(_cell(cell.get(name, [])) for name in decoders)} |")
        lines.append("")
    return "\n".join(lines)


def _cell(rows: list[dict[str, Any]]) -> str:
    """The figures on one and on two threads."""
    if not rows:
        return "pyav's"
    wrong = min(row.get("right", 1.0) for row in rows)
    said = f", {100 * (1 - wrong):.0f} % of clips wrong" if wrong < 1 else ""
    return f"{' / '.join(format(row['clips_per_s'], '.0f') for row in rows)} ({rows[0]['cpu_ms']:.0f} ms){said}"


def main() -> None:
    """Measure, or write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=0.5, help="of each figure (default %(default)s)")
    parser.add_argument("--only", default="", metavar="TEXT", help="kinds of film with this text in their names")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--page", type=Path, help="write the recorded rows into this page, and measure nothing")
    args = parser.parse_args()
    if args.page:
        result = json.loads(RESULTS.read_text(encoding="utf-8"))
        write_text(args.page, page(args.page.read_text(encoding="utf-8"), result))
        return
    import av.logging

    av.logging.set_level(None)
    result = measure(args.seconds, args.only)
    if args.json:
        write_json(args.json, result)


if __name__ == "__main__":
    main()
