"""Published evaluation files, which train nothing: recognised, and answered with the command for it here."""

from __future__ import annotations

import shlex
from typing import Any

# Tasks of ``vjepa-fast probe`` with the published frames and views, by number of classes.
_TASKS = {48: "diving48", 174: "ssv2", 400: "k400"}
_PROBED = ("video_classification_frozen", "image_classification_frozen")


def is_evaluation(values: dict[str, Any]) -> bool:
    """Whether a YAML file is one of the published evaluations."""
    return "eval_name" in values and "app" not in values


def answer(values: dict[str, Any]) -> str:
    """What an evaluation file is, and the command that does the same here, in one line."""
    name = str(values["eval_name"])
    if name not in _PROBED:
        return (
            f"is an evaluation ({name}) that this package does not have; it has frozen probes: vjepa-fast probe --help"
        )
    words = ["vjepa-fast", "probe", *_arguments(values)]
    more = " (the probe is fitted here, a released one is not read)" if values.get("val_only") else ""
    return f"is an evaluation ({name}), no training; here it is: {shlex.join(words)}{more}; see docs/evaluation.md"


def _arguments(values: dict[str, Any]) -> list[str]:
    data, optimization = (_section(values, "experiment", key) for key in ("data", "optimization"))
    image = values["eval_name"] == "image_classification_frozen"
    words = [
        str(_section(values, "model_kwargs").get("checkpoint") or "CHECKPOINT"), "--which", "target_encoder",
        "--no-random", "--probes", "attentive",
        "--train", _manifest(data.get("dataset_train"), "train.csv"),
        "--test", _manifest(data.get("dataset_val"), "val.csv"),
    ]  # fmt: skip
    frames = _section(values, "model_kwargs", "wrapper_kwargs").get("img_as_video_nframes")
    task = None if image else _TASKS.get(data.get("num_classes", 0))
    given = {"--task": task, "--crop-size": data.get("resolution")}
    if task is None:
        given |= {
            "--num-frames": frames if image else data.get("frames_per_clip"),
            "--frame-step": data.get("frame_step"),
            "--clips": data.get("num_segments"),
            "--crops": data.get("num_views_per_segment"),
            "--epochs": optimization.get("num_epochs"),
        }
    return words + [str(word) for flag, value in given.items() if value is not None for word in (flag, value)]


def _section(values: dict[str, Any], *path: str) -> dict[str, Any]:
    found: Any = values
    for key in path:
        found = found.get(key) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else {}


def _manifest(path: object, default: str) -> str:
    return path if isinstance(path, str) else default
