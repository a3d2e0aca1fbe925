"""The encoders of a checkpoint beside their control, and the configuration that the checkpoint holds."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from vjepa_fast.config.schema import Config
from vjepa_fast.errors import CheckpointError
from vjepa_fast.evaluation.controls import random_encoder
from vjepa_fast.models.vit import VisionTransformer

WHICH = ("target_encoder", "encoder")
Say = Callable[[str], None]


def checkpoint_config(path: str | os.PathLike) -> Config | None:
    """The configuration inside a checkpoint or run folder; None where the file holds none (FAIR weights)."""
    from vjepa_fast import config
    from vjepa_fast.models.weights import open_weights, own_config

    file, content, _ = open_weights(path)
    found = own_config(content)
    return None if found is None else config.from_dict(found, source=str(file))


def cache_folder(path: str | os.PathLike) -> Path:
    """Where the features of a checkpoint are kept by default: ``features`` in its run folder or beside the file."""
    path = Path(path)
    if path.is_dir():
        return path / "features"
    return (path.parent.parent if path.parent.name == "checkpoints" else path.parent) / "features"


@dataclass(frozen=True)
class Subject:
    """A checkpoint file or run folder, and how its encoders are measured.

    ``which``: of two encoders one may be missing. ``config``: for files that hold none. ``random``: with the
    random-init control. ``on_progress`` gets a line of text before each part, and about an encoder that is missing.
    """

    path: str | os.PathLike
    which: Sequence[str] = WHICH
    config: Config | None = None
    random: bool = True
    device: str | torch.device = "cpu"
    cache_dir: str | os.PathLike | None = None
    on_progress: Say | None = None

    def say(self, text: str) -> None:
        """Report what comes next."""
        if self.on_progress is not None:
            self.on_progress(text)

    def encoders(self) -> list[tuple[str, str, VisionTransformer]]:
        """(label, kind, encoder), first the random-init control.

        Raises:
            CheckpointError: missing or damaged, another architecture, none of the encoders in it, or no configuration
                for the control.
        """
        from vjepa_fast import models

        found = []
        if self.random:
            config = self.config or checkpoint_config(self.path)
            if config is None:
                raise CheckpointError(
                    f"{self.path}: holds no configuration, so the random-init control cannot be built; give --config "
                    "or --no-random"
                )
            found.append(("random init", "random", random_encoder(config)))
        for name in self.which:
            try:
                encoder = models.load_encoder(Path(self.path), which=name, config=self.config)
            except CheckpointError as error:
                if len(self.which) == 1 or "holds no" not in str(error):
                    raise
                self.say(f"{error}; left out")
            else:
                found.append((name, "pretrained", encoder))
        if all(kind == "random" for _, kind, _ in found):
            raise CheckpointError(f"{self.path}: holds none of {', '.join(self.which)}")
        return found
