"""Frozen evaluation: features, probes, few-shot episodes, controls, and honest intervals."""

from vjepa_fast.evaluation.controls import Supervised, pixel_features, random_encoder, train_supervised
from vjepa_fast.evaluation.extract.clips import ClipSet, decode_clips
from vjepa_fast.evaluation.extract.features import Features, encode, extract_features, pool_tokens
from vjepa_fast.evaluation.extract.tokens import Tokens, extract_tokens, open_tokens
from vjepa_fast.evaluation.extract.videos import VideoFeatures, video_features
from vjepa_fast.evaluation.fewshot import (
    EpisodeProtocol,
    EpisodeResult,
    episode_protocol,
    evaluate_episodes,
    logistic_episodes,
    prototype_episodes,
    sample_episodes,
)
from vjepa_fast.evaluation.fewshot.leakage import Leakage, find_leakage
from vjepa_fast.evaluation.intervals import PairedResult, mean_ci95, paired_difference, student_ci95, wilson
from vjepa_fast.evaluation.probes.attentive import AttentiveHeads, attentive_probe
from vjepa_fast.evaluation.probes.knn import knn_probe
from vjepa_fast.evaluation.probes.linear import linear_probe
from vjepa_fast.evaluation.probes.probe import PROBES, ProbeResult, split_validation
from vjepa_fast.evaluation.probes.published import published_probe
from vjepa_fast.evaluation.readout import Choice, Readout
from vjepa_fast.evaluation.run.geometry import checkpoint_geometry, geometry_rows
from vjepa_fast.evaluation.run.quick import quick_probe
from vjepa_fast.evaluation.run.rows import Row, against, episode_rows, fewshot_rows, probe_rows, readout_rows
from vjepa_fast.evaluation.tasks import TASKS, Task, get_task

__all__ = [
    "AttentiveHeads",
    "Choice",
    "ClipSet",
    "EpisodeProtocol",
    "EpisodeResult",
    "Features",
    "Leakage",
    "PROBES",
    "PairedResult",
    "ProbeResult",
    "Readout",
    "Row",
    "Supervised",
    "TASKS",
    "Task",
    "Tokens",
    "VideoFeatures",
    "against",
    "attentive_probe",
    "checkpoint_geometry",
    "decode_clips",
    "encode",
    "episode_protocol",
    "episode_rows",
    "evaluate_episodes",
    "extract_features",
    "extract_tokens",
    "fewshot_rows",
    "find_leakage",
    "geometry_rows",
    "get_task",
    "knn_probe",
    "linear_probe",
    "logistic_episodes",
    "mean_ci95",
    "open_tokens",
    "paired_difference",
    "pixel_features",
    "pool_tokens",
    "probe_rows",
    "prototype_episodes",
    "published_probe",
    "quick_probe",
    "random_encoder",
    "readout_rows",
    "sample_episodes",
    "split_validation",
    "student_ci95",
    "train_supervised",
    "video_features",
    "wilson",
]
