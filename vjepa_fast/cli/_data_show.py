"""``vjepa-fast data show``: a sheet of the clips that training reads, with their masks; and what a manifest holds."""

from __future__ import annotations

import argparse
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from vjepa_fast.cli._arguments import add_overrides, positive

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    from vjepa_fast.config.schema import Config
    from vjepa_fast.data.loader import ClipGroup, ClipLoader
    from vjepa_fast.data.manifests.manifest import Manifest

_SIDE = 112  # pixels of a picture on the sheet
_RECIPE = "mixed_4gpu_ld"
_TEXT = 14  # and of a line of text
_COLUMNS = 8  # frames of a clip that are shown


def add_show(commands: Any) -> None:
    """Declare ``show``."""
    show = commands.add_parser(
        "show",
        help="write a sheet of augmented clips, their masks and frame numbers",
        description="Reads the first clips that training with CONFIG would read of a manifest, and writes them as one "
        "picture: frames as cropped and flipped with their numbers in the film; below them the same with what the "
        "first mask hides and lets the model predict in grey, and what is neither context nor predicted in black.",
    )
    show.add_argument("manifest", help="manifest to show")
    show.add_argument(
        "config", nargs="?", default=_RECIPE, help="YAML file, recipe name or run folder (default %(default)s)"
    )
    add_overrides(show)
    show.add_argument("--clips", type=positive, default=6, metavar="N", help="clips shown (default %(default)s)")
    show.add_argument("--out", default="sheet.png", help="the picture (default %(default)s)")


def show(args: argparse.Namespace) -> int:
    """Write the sheet."""
    from dataclasses import replace

    from vjepa_fast import config
    from vjepa_fast.data.loader import ClipLoader
    from vjepa_fast.data.manifests.manifest import load_manifest
    from vjepa_fast.files import atomic_path

    cfg = config.load(args.config, args.overrides)
    image = load_manifest(args.manifest).kind == "image"
    section = cfg.img_data if image and cfg.img_data is not None else cfg.data
    fpcs = (1,) if image else section.dataset_fpcs[:1]
    data = replace(
        section,
        datasets=(args.manifest,),
        datasets_weights=None,
        dataset_fpcs=fpcs,
        batch_size=args.clips,
        pin_mem=False,
        max_bad_fraction=1.0,
    )
    cfg = replace(cfg, data=data, img_data=None)
    with ClipLoader(cfg) as loader:
        (group,) = next(loader).groups
        sheet = _sheet(cfg, loader, group)
    with atomic_path(args.out) as path:
        sheet.save(path, format="JPEG" if str(args.out).lower().endswith((".jpg", ".jpeg")) else "PNG")
    print(f"{len(group.paths)} clips of {args.manifest}: {args.out}")
    return 0


def _sheet(cfg: Config, loader: ClipLoader, group: ClipGroup) -> Image:
    """Two rows of pictures for each clip, under its name."""
    import numpy as np
    from PIL import Image, ImageDraw

    from vjepa_fast.errors import DataError

    shown = np.unique(np.linspace(0, group.fpc - 1, min(_COLUMNS, group.fpc)).round().astype(int))
    height = 2 * _TEXT + 2 * _SIDE
    sheet = Image.new("RGB", (_SIDE * max(4, len(shown)), height * len(group.paths)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (clip, hidden) in enumerate(zip(group.clip.cpu().numpy(), _hidden(cfg, group))):
        top = i * height
        draw.text((2, top), f"{i}: {group.paths[i]}, label {int(group.labels[i])}", fill="black")
        try:
            numbers = loader.frame_numbers(group.first_sample + i)
        except DataError:  # another stands in for it
            numbers = np.full(group.fpc, -1)
        for column, frame in enumerate(shown.tolist()):
            x = column * _SIDE
            draw.text((x + 2, top + _TEXT), f"frame {numbers[min(frame, len(numbers) - 1)]}", fill="black")
            picture = clip[:, frame].transpose(1, 2, 0)
            for row, pixels in enumerate((picture, _masked(picture, hidden[frame]))):
                small = Image.fromarray(pixels).resize((_SIDE, _SIDE))
                sheet.paste(small, (x, top + 2 * _TEXT + row * _SIDE))
    return sheet


def _hidden(cfg: Config, group: ClipGroup) -> np.ndarray:
    """Of each pixel of each clip 0: context, 1: predicted, 2: neither, uint8 ``[B, F, S, S]``; by the first mask."""
    import numpy as np

    from vjepa_fast.trainer.step import build_samplers

    sampler = build_samplers(cfg)[group.modality == "image"]
    clip = group.clip.cpu()
    masks = sampler.draw(clip, step=0, first_sample=group.first_sample).masks
    steps, rows, columns = sampler.grid(clip.shape)
    hidden = np.full((len(clip), steps * rows * columns), 2, np.uint8)
    for row, enc, pred, n, m in zip(hidden, masks.enc[0], masks.pred[0], masks.enc_len[0], masks.pred_len[0]):
        row[enc[: int(n)].numpy()] = 0
        row[pred[: int(m)].numpy()] = 1
    hidden = hidden.reshape(len(clip), steps, rows, columns)
    for axis, size in ((1, clip.shape[2]), (2, clip.shape[3]), (3, clip.shape[4])):
        hidden = hidden.repeat(size // hidden.shape[axis], axis=axis)
    return hidden


def _masked(picture: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """What is predicted in grey, what is neither predicted nor context in black."""
    import numpy as np

    grey = (picture.mean(-1, keepdims=True) / 3 + 120).astype(np.uint8)
    masked = np.where(hidden[..., None] == 1, grey, picture)
    return np.where(hidden[..., None] == 2, np.uint8(0), masked).astype(np.uint8)


def contents(manifest: Manifest) -> list[str]:
    """What kinds of film a manifest lists, as far as their indices are known: a line for each codec and size."""
    from vjepa_fast.data.decoders.index_cache import INDICES

    kinds: defaultdict[tuple[str, int, int], list[tuple[int, float, int]]] = defaultdict(list)
    for path in dict.fromkeys(manifest.paths):
        index = INDICES.known(path)
        if index is not None:
            kinds[index.codec, index.width, index.height].append((index.frames, index.rate, len(index.key)))
    lines = []
    for (codec, width, height), films in sorted(kinds.items(), key=lambda item: -len(item[1])):
        frames, rates, keys = ([film[i] for film in films] for i in range(3))
        rate = f"{min(rates):.4g}" if min(rates) == max(rates) else f"{min(rates):.4g} to {max(rates):.4g}"
        lines.append(
            f"{len(films)} x {codec} {width} x {height}, {rate} frames/s, {min(frames)} to {max(frames)} frames, "
            f"a key frame every {sum(frames) / max(1, sum(keys)):.0f}"
        )
    return lines


def speeds(args: argparse.Namespace, manifest: Manifest) -> list[str]:
    """Clips per second here with each usable decoder, and hours for all samples."""
    from dataclasses import replace

    from vjepa_fast import config
    from vjepa_fast.data.fastest import fastest

    cfg = config.Config()
    data = replace(
        cfg.data, datasets=(args.manifest,), dataset_fpcs=(args.frames,), frame_sample_rate=args.frame_step,
        fps=args.fps, duration=args.duration, num_workers=args.workers, max_bad_fraction=1.0,
    )  # fmt: skip
    found = fastest(replace(cfg, data=data))
    return [
        f"{name}: {rate:.1f} clips/s of {args.frames} frames on {args.workers} threads, an epoch in "
        f"{len(manifest) / rate / 3600:.2g} h"
        for name, rate in found.clips_per_s.items()
    ]
