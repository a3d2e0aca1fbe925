"""What of a configuration depends on the data and on the number of processes: iterations per epoch, micro-batches."""

from __future__ import annotations

from dataclasses import replace

from vjepa_fast.config.schema import Config
from vjepa_fast.data.manifests.manifest import load_manifest
from vjepa_fast.data.manifests.root import Root
from vjepa_fast.errors import ConfigError
from vjepa_fast.trainer.distributed import Distributed


def resolve(cfg: Config) -> Config:
    """The configuration with its micro-batches and iterations counted.

    ``optimization.global_batch`` gives ``accumulate``, in place of the number that stands there;
    ``optimization.ipe: 0`` is whole batches of all processes in the samples of ``data``.

    Raises:
        ConfigError: the global batch is no multiple of what the processes read at once, or the samples are fewer than
            one batch.
        DataError: a manifest cannot be used.
    """
    cfg = micro_batches(cfg, Distributed.world_from_env())
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


def micro_batches(cfg: Config, world: int) -> Config:
    """The configuration with ``accumulate`` as ``optimization.global_batch`` gives it for so many processes.

    Raises:
        ConfigError: it is no multiple of what they read at once.
    """
    wanted, at_once = cfg.optimization.global_batch, cfg.data.batch_size * world
    if not wanted:
        return cfg
    if wanted % at_once:
        raise ConfigError(
            f"optimization.global_batch: {wanted} clips are no multiple of the {at_once} that are read at once "
            f"(data.batch_size {cfg.data.batch_size} x {world} processes); change one of the three"
        )
    return replace(cfg, optimization=replace(cfg.optimization, accumulate=wanted // at_once))
