"""``optimization.ipe: 0``: as many iterations per epoch as one pass over the data has."""

from __future__ import annotations

from dataclasses import replace

from vjepa_fast.config.schema import Config
from vjepa_fast.data.manifests.manifest import load_manifest
from vjepa_fast.data.manifests.root import Root
from vjepa_fast.errors import ConfigError
from vjepa_fast.trainer.distributed import Distributed


def resolve(cfg: Config) -> Config:
    """The configuration with its iterations counted: whole batches of all processes in the samples of ``data``.

    Raises:
        ConfigError: the samples are fewer than one batch.
        DataError: a manifest cannot be used.
    """
    if cfg.optimization.ipe or not cfg.data.datasets:
        return cfg
    samples = sum(len(load_manifest(path, Root.of(cfg.data))) for path in cfg.data.datasets)
    batch = cfg.data.batch_size * Distributed.world_from_env() * cfg.optimization.accumulate
    if samples < batch:
        raise ConfigError(
            f"optimization.ipe: 0 is one pass over the data, whose {samples} samples are fewer than a batch of "
            f"{batch}; lower data.batch_size or give a number"
        )
    return replace(cfg, optimization=replace(cfg.optimization, ipe=samples // batch))
