"""The encoders of a checkpoint beside their control, and the configuration that the checkpoint holds."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from vjepa_fast.config.schema import Config
from vjepa_fast.errors import CheckpointError
from vjepa_fast.evaluation.controls import random_encoder
from vjepa_fast.models.vit import VisionTransformer

WHICH = ("target_encoder", "encoder")
Say = Callable[[str], None]


def checkpoint_config(path: str | os.PathLike) -> Config | None:
    """The configuration inside a checkpoint or run folder; None where the file holds none (FAIR weights)."""
    from vjepa_fast import config
    from vjepa_fast.models.interop import newest_checkpoint, read_checkpoint

    path = Path(path)
    path = newest_checkpoint(path) if path.is_dir() else path
    found = read_checkpoint(path).get("config")
    return None if found is None else config.from_dict(found, source=str(path))


def cache_folder(path: str | os.PathLike) -> Path:
    """Where the features of a checkpoint are kept by default: ``features`` in its run folder or beside the file."""
    path = Path(path)
    if path.is_dir():
        return path / "features"
    return (path.parent.parent if path.parent.name == "checkpoints" else path.parent) / "features"


def encoders_of(
    path: str | os.PathLike,
    which: Sequence[str] = WHICH,
    *,
    config: Config | None = None,
    random: bool = True,
    say: Say = print,
) -> list[tuple[str, str, VisionTransformer]]:
    """(label, kind, encoder) of a checkpoint file or run folder, first the random-init control if ``random``.

    Of two encoders one may be missing; ``say`` gets a line about it.

    Raises:
        CheckpointError: missing or damaged, another architecture, none of the encoders in it, or no configuration for
            the control.
    """
    from vjepa_fast import models

    found = config or checkpoint_config(path)
    control = []
    if random:
        if found is None:
            raise CheckpointError(
                f"{path}: holds no configuration, so the random-init control cannot be built; give --config or "
                "--no-random"
            )
        control = [("random init", "random", random_encoder(found))]
    encoders = []
    for name in which:
        try:
            encoders.append((name, "pretrained", models.load_encoder(Path(path), which=name, config=config)))
        except CheckpointError as error:
            if len(which) == 1 or "holds no" not in str(error):
                raise
            say(f"{error}; left out")
    if not encoders:
        raise CheckpointError(f"{path}: holds none of {', '.join(which)}")
    return control + encoders
