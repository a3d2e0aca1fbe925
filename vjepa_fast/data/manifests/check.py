"""Checking what a manifest lists. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from vjepa_fast.data.decoders import choose_decoder, read_image
from vjepa_fast.data.manifests.manifest import Manifest
from vjepa_fast.data.sampling import Sampling
from vjepa_fast.errors import DataError


def check_manifest(
    manifest: Manifest,
    *,
    num_frames: int = 16,
    sampling: Sampling | None = None,
    full: bool = False,
    workers: int = 2,
    decoder: str = "auto",
    on_progress: Callable[[int], None] | None = None,
) -> list[tuple[str, str]]:
    """Read a clip from the middle of every sample, or every frame.

    Clips are of ``num_frames`` frames, consecutive ones unless ``sampling`` says otherwise; ``full`` also reads every
    frame. ``on_progress`` is called with the number of samples read so far.

    Returns:
        (path, reason) of each sample that cannot be read, in the manifest's order.
    """
    sampling = sampling or Sampling()
    reader = choose_decoder(decoder, "--decoder")

    def problem(path: str) -> str | None:
        try:
            if manifest.kind == "image":
                read_image(path)
                return None
            reader.read_clip(path, num_frames, sampling, "center")
            if full:
                reader.read_clip(path, reader.probe(path)["frames"], Sampling(), 0)
            return None
        except DataError as error:
            return str(error)

    bad = []
    with ThreadPoolExecutor(max(1, workers)) as pool:
        for number, (path, reason) in enumerate(zip(manifest.paths, pool.map(problem, manifest.paths)), start=1):
            if reason is not None:
                bad.append((path, reason))
            if on_progress is not None:
                on_progress(number)
    return bad
