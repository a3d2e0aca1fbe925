"""Checking what a manifest lists. Needs no torch."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from vjepa_fast.data.decoders import choose_decoder, read_image
from vjepa_fast.data.decoders.index_cache import INDICES
from vjepa_fast.data.manifests.manifest import Manifest
from vjepa_fast.data.media import ReadOptions
from vjepa_fast.data.members import is_url
from vjepa_fast.data.sampling import Sampling
from vjepa_fast.errors import DataError, UserError


def check_manifest(
    manifest: Manifest,
    *,
    num_frames: int = 16,
    sampling: Sampling | None = None,
    full: bool = False,
    workers: int = 2,
    decoder: str = "auto",
    options: ReadOptions | None = None,
    on_progress: Callable[[float], None] | None = None,
) -> list[tuple[str, str]]:
    """Read a clip from the middle of every sample, or every frame.

    Clips are of ``num_frames`` frames, consecutive ones unless ``sampling`` says otherwise; ``full`` also reads every
    frame, one after another, so that memory does not grow with a film; ``options.max_seconds`` is for the clip alone.
    ``on_progress`` is called with the number of samples read so far, parts of those being read included.

    Returns:
        (path, reason) of each sample that cannot be read, in the manifest's order.
    """
    sampling = sampling or Sampling()
    reader = choose_decoder(decoder, "--decoder", options)
    progress = _Progress(on_progress)

    def problem(row: int) -> str | None:
        path = manifest.paths[row]
        try:
            if manifest.kind == "image":
                read_image(path, options)
                return None
            reader.read_clip(path, num_frames, sampling, "center")
            if full:
                reader.verify(path, lambda share: progress.set(row, share))
            return None
        except DataError as error:
            return str(error)
        finally:
            progress.set(row, 1.0)

    with ThreadPoolExecutor(max(1, workers)) as pool:
        reasons = list(pool.map(problem, range(len(manifest))))
    return [(path, reason) for path, reason in zip(manifest.paths, reasons) if reason is not None]


def keep_indices(manifest: Manifest) -> list[str]:
    """Write the frame indices made so far beside the manifest, so that training need not make them.

    Returns:
        What a user should know of the videos, in sentences.
    """
    if manifest.kind != "video" or is_url(manifest.path):
        return []
    notes = []
    try:
        INDICES.save(manifest.path, manifest.paths)
    except UserError as error:
        notes.append(str(error))
    indices = [index for path in manifest.paths if (index := INDICES.known(path)) is not None]
    for number, what in (
        (sum(index.interlaced for index in indices), "are interlaced; data.deinterlace: true fills the second field"),
        (
            sum(not index.constant for index in indices),
            "have a varying frame rate; data.fps and data.duration go by time",
        ),
        (
            sum(len(index.gaps) > 0 for index in indices),
            "have packets that show no frame; clips across them are refused",
        ),
    ):
        if number:
            notes.append(f"{number} of {len(indices)} videos {what}")
    return notes


class _Progress:
    """Adds up the shares of all samples."""

    def __init__(self, report: Callable[[float], None] | None) -> None:
        self._report, self._lock = report, threading.Lock()
        self._done: set[int] = set()
        self._shares: dict[int, float] = {}  # of the samples that are being read

    def set(self, row: int, share: float) -> None:
        with self._lock:
            self._shares[row] = share
            if share == 1.0 or row in self._done:  # the end of a film may be reported twice
                del self._shares[row]
                self._done.add(row)
            if self._report is not None:
                self._report(len(self._done) + sum(self._shares.values()))
