"""Rendering a suite to a folder of real files: H.264 .mp4 (or .rows, lossless) and .jpg, manifests, class names.

    FOLDER/suite.json             parameters of the rendering
    FOLDER/classes.json           class names; the label is the position
    FOLDER/train.csv, ...         manifests: <path relative to the manifest> <label>
    FOLDER/train_attributes.json  what each clip was drawn with, in the manifest's order
    FOLDER/train/000000.mp4 ...

Every clip is a function of (seed, suite, split, index), for any number of workers. Files appear whole or not at
all, manifests after their last clip, so an interrupted rendering is completed by repeating it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vjepa_fast.data.decoders.rows import write_rows
from vjepa_fast.data.processes import pool_of
from vjepa_fast.data.synthetic.api import SUITES, Suite, render_clip
from vjepa_fast.errors import ConfigError, DataError, UserError
from vjepa_fast.files import atomic_path, parse_json, write_json, write_text
from vjepa_fast.registry import suggestion

FORMAT = 2  # to be raised when the same parameters give other clips
FORMS = ("mp4", "rows")  # of videos
_CHUNK = 32
_HINT = "choose a writable folder with free space"
Row = tuple[str, int, dict[str, Any]]  # path relative to the suite's folder, label, attributes


def suite_values(name: str) -> dict[str, Any]:
    """What a suite looks like in this version of the package: its parameters and the format of its rendering."""
    return json.loads(json.dumps({"format": FORMAT, **dataclasses.asdict(SUITES[name])}))


def render_suite(
    name: str | Suite,
    folder: str | os.PathLike[str],
    *,
    splits: Mapping[str, int],
    size: int = 64,
    frames: int = 16,
    fps: int = 8,
    seed: int = 0,
    workers: int = 1,
    form: str = "mp4",
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, str]:
    """Render a suite, or what is missing of it.

    Args:
        name: a registered name (`SUITES`), or a suite's dataclass with other parameters.
        folder: to write; made if it is not there.
        splits: number of clips of each split, for example ``{"train": 1000, "val": 200, "test": 400}``. Labels are
            balanced. A split of 0 clips is left out. No clip is in two splits.
        size, frames, fps: pixels of each side (even), frames of each video (images have one) and of each second.
        seed: of everything random.
        workers: processes.
        form: of the videos, one of `FORMS`: "mp4" is H.264; "rows" keeps every pixel (in 3 bytes), is read in a
            fraction of the time, and needs PyAV neither to be written nor to be read.
        on_progress: called with (clips done, clips in all).

    Returns:
        Split -> path of its manifest.

    Raises:
        ConfigError: no suite or form of that name.
        DataError: odd size, folder not writable, or one that holds another rendering.
        UserError: a file cannot be written, or a worker process was killed.
    """
    suite = SUITES.get_named(name, "suite") if isinstance(name, str) else name
    _check(suite, splits, size, frames, fps)
    folder = Path(folder)
    rendering = {"format": FORMAT, "suite": suite.name, "size": size, "frames": frames, "fps": fps, "seed": seed}
    if form not in FORMS:
        raise ConfigError(f"form {form!r} is not known; choose from {', '.join(FORMS)}{suggestion(form, FORMS)}")
    of_form = {} if form == "mp4" else {"form": form}
    parameters = {**rendering, **of_form, "suite_parameters": dataclasses.asdict(suite)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _claim(folder, json.loads(json.dumps(parameters)))
        job = partial(_render_chunk, suite, folder, size, frames, fps, seed, form)
        _render_all(job, folder, splits, workers, on_progress or (lambda done, total: None))
        write_json(folder / "classes.json", list(suite.classes), _HINT)
    except BrokenProcessPool:
        raise UserError(
            f"{folder}: a worker process was killed, perhaps for want of memory; what is rendered is kept, the same "
            "command goes on; use fewer workers"
        ) from None
    except OSError as error:
        raise DataError(f"{folder}: cannot write the suite ({error.strerror or error}); {_HINT}") from None
    return {split: str(folder / f"{split}.csv") for split, count in splits.items() if count}


def _check(suite: Suite, splits: Mapping[str, int], size: int, frames: int, fps: int) -> None:
    for key, value, least in (("size", size, 16), ("frames", frames, 2), ("fps", fps, 1)):
        if value < least:
            raise DataError(f"synthetic {suite.name}: {key} is {value}, must be at least {least}")
    if size % 2:
        raise DataError(f"synthetic {suite.name}: size is {size}, must be even (H.264 halves the colour planes)")
    for split, count in splits.items():
        if count < 0:
            raise DataError(f"synthetic {suite.name}: {split} is {count}, must be 0 or more clips")
        try:
            suite.split_labels(split)
        except ValueError as error:
            raise DataError(f"synthetic {error}") from None


def _claim(folder: Path, parameters: dict[str, Any]) -> None:
    """Note the parameters, or refuse a folder that was rendered with others."""
    path = folder / "suite.json"
    if path.exists():
        try:
            found = parse_json(path.read_text(encoding="utf-8"))
        except ValueError:
            found = {}
        found = found if isinstance(found, dict) else {}
        changed = sorted(key for key in {*parameters, *found} if found.get(key) != parameters.get(key))
        if changed:
            raise DataError(
                f"{folder}: already holds a suite rendered with another {', '.join(changed)}; "
                "choose another folder or remove this one"
            )
    else:
        write_json(path, parameters, _HINT)


def _render_all(
    job: Callable[[tuple[str, int, int]], list[Row]],
    folder: Path,
    splits: Mapping[str, int],
    workers: int,
    on_progress: Callable[[int, int], None],
) -> None:
    chunks = [
        (split, start, min(start + _CHUNK, count))
        for split, count in splits.items()
        for start in range(0, count, _CHUNK)
    ]
    for split, count in splits.items():
        if count:
            (folder / split).mkdir(exist_ok=True)
    total, done = sum(splits.values()), 0
    rows: dict[str, list[Row]] = {split: [] for split in splits}
    workers = min(workers, len(chunks))
    with contextlib.ExitStack() as stack:
        results = map(job, chunks)
        if workers > 1:
            results = stack.enter_context(pool_of(workers)).map(job, chunks)
        for (split, start, end), part in zip(chunks, results, strict=True):
            rows[split] += part
            done += end - start
            on_progress(done, total)
    for split, part in rows.items():
        if part:
            write_json(folder / f"{split}_attributes.json", [attributes for _, _, attributes in part], _HINT)
            write_text(folder / f"{split}.csv", "".join(f"{path} {label}\n" for path, label, _ in part), _HINT)


def _render_chunk(
    suite: Suite, folder: Path, size: int, frames: int, fps: int, seed: int, form: str, chunk: tuple[str, int, int]
) -> list[Row]:
    split, start, end = chunk
    labels = suite.split_labels(split)
    suffix = form if suite.modality == "video" else "jpg"
    write = (
        partial(write_video if form == "mp4" else _write_rows, fps=fps) if suite.modality == "video" else write_image
    )
    rows = []
    for index in range(start, end):
        rng = np.random.default_rng([seed, zlib.crc32(suite.name.encode()), zlib.crc32(split.encode()), index])
        clip, label, attributes = render_clip(suite, rng, size, frames, label=labels[index % len(labels)])
        name = f"{split}/{index:06d}.{suffix}"
        path = folder / name
        if not path.exists() or path.stat().st_size == 0:  # a power cut may leave empty files
            write(path, clip)
        rows.append((name, label, attributes))
    return rows


def write_video(path: str | Path, clip: np.ndarray, fps: int = 8, crf: int = 18, gop: int = 8) -> None:
    """Write uint8 RGB frames ``[F, H, W, 3]`` as H.264 (yuv420p). The same frames give the same file."""
    import av

    with atomic_path(path, _HINT, sync=False) as temporary, av.open(str(temporary), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.height, stream.width, stream.pix_fmt = clip.shape[1], clip.shape[2], "yuv420p"
        stream.codec_context.gop_size = gop
        stream.codec_context.thread_count = 1
        stream.options = {"crf": str(crf), "preset": "veryfast", "bf": "0"}
        for array in clip:
            frame = av.VideoFrame.from_ndarray(array, format="rgb24").reformat(format="yuv420p", threads=1)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _write_rows(path: Path, clip: np.ndarray, fps: int) -> None:
    write_rows(path, clip, count=len(clip), size=clip.shape[1:3], fps=fps, coding="raw")


def write_image(path: str | Path, clip: np.ndarray, quality: int = 95) -> None:
    """Write the first frame of uint8 RGB ``[1, H, W, 3]`` as JPEG."""
    from PIL import Image

    with atomic_path(path, _HINT, sync=False) as temporary:
        Image.fromarray(clip[0]).save(temporary, format="JPEG", quality=quality)
