"""Frozen evaluation: features, probes, few-shot episodes, controls, and honest intervals."""

from vjepa_fast.evaluation.baselines import Supervised, pixel_features, random_encoder, train_supervised
from vjepa_fast.evaluation.collapse import checkpoint_geometry, geometry_rows
from vjepa_fast.evaluation.compare import Row, against, episode_rows, probe_rows
from vjepa_fast.evaluation.features import ClipSet, Features, decode_clips, encode, extract_features, pool_tokens
from vjepa_fast.evaluation.fewshot import EpisodeResult, prototype_episodes, sample_episodes
from vjepa_fast.evaluation.intervals import PairedResult, mean_ci95, paired_difference, wilson
from vjepa_fast.evaluation.probes import ProbeResult, knn_probe, linear_probe, split_validation

__all__ = [
    "ClipSet",
    "EpisodeResult",
    "Features",
    "PairedResult",
    "ProbeResult",
    "Row",
    "Supervised",
    "against",
    "checkpoint_geometry",
    "decode_clips",
    "encode",
    "episode_rows",
    "extract_features",
    "geometry_rows",
    "knn_probe",
    "linear_probe",
    "mean_ci95",
    "paired_difference",
    "pixel_features",
    "pool_tokens",
    "probe_rows",
    "prototype_episodes",
    "random_encoder",
    "sample_episodes",
    "split_validation",
    "train_supervised",
    "wilson",
]
