"""How a study reads a frozen encoder on a suite, the same way for every encoder: rows of accuracies.

Few-shot suites: the readout is chosen among `CANDIDATES` on the validation classes and read on the novel ones once.
Other suites: a linear probe (and kNN) on features of one pooling.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vjepa_fast.evaluation import extract_features, pixel_features, probe_rows
from vjepa_fast.evaluation.fewshot.protocols import EpisodeProtocol
from vjepa_fast.evaluation.readout import Readout, choose, fit
from vjepa_fast.evaluation.run.rows import readout_rows

if TYPE_CHECKING:
    from vjepa_fast.evaluation import Row
    from vjepa_fast.models.vit import VisionTransformer

POOLING = "tdiff"  # of probed suites: the probe learns what of it to weigh
# Poolings of the last level, standardised by base clips, with cosine prototypes. "sal" is not among them: it looks by
# itself where a clip moves, so that random weights read 63 % of 5-shot episodes with it and little is left to learn.
CANDIDATES = tuple(Readout("last", pooling, "standard", "cosine") for pooling in ("tdiff", "time", "meanstd", "mean"))
OF_CLASS_TOKEN = Readout("last", "cls", "standard", "cosine")  # a candidate too, of an encoder that has one
OF_PIXELS = (Readout("input", "pixels", "standard", "cosine"),)


@dataclass(frozen=True)
class How:
    """The evaluation of a study: ``pooling`` of probed suites, ``way``, ``queries`` and ``episodes`` of the others,
    ``probes``, and the ``seed`` of episodes and held-out parts. ``where``: arguments of `extract_features`.
    """

    pooling: str = POOLING
    probes: Sequence[str] = ("linear", "knn")
    way: int = 5
    queries: int = 5
    episodes: int = 1000
    seed: int = 0
    where: Mapping[str, Any] | None = None


def suite_rows(
    label: str,
    kind: str,
    suite: str,
    encoder: VisionTransformer | str,
    parts: Mapping[str, Any],
    few_shot: bool,
    how: How,
) -> list[Row]:
    """Rows of one encoder (or "pixels") on one suite; ``parts``: train, val and test, clips or manifests.

    ``few_shot``: train has base classes, val and test have novel ones. Without val the pooling of probed suites is
    centred by the base classes.
    """
    where: Any = dict(how.where or {})
    if not few_shot:
        if isinstance(encoder, str):
            found = {part: pixel_features(source) for part, source in parts.items()}
        else:
            found = {
                part: extract_features(encoder, source, pooling=how.pooling, **where) for part, source in parts.items()
            }
        of = found["train"], found.get("val"), found["test"]
        return probe_rows(label, kind, suite, *of, probes=how.probes, seed=how.seed)
    given = Readout("last", how.pooling, "centre", "cosine")
    candidates = OF_PIXELS if isinstance(encoder, str) else CANDIDATES
    if getattr(encoder, "cls_token", None) is not None:
        candidates = (*candidates, OF_CLASS_TOKEN)
    if "val" in parts:
        choice = choose(encoder, parts["train"], parts["val"], candidates=candidates, seed=how.seed, **where)
    else:
        choice = fit(encoder, given, parts["train"], seed=how.seed, **where)
    protocol = EpisodeProtocol("study", how.way, (1, 5), how.queries, how.episodes, how.seed)
    return readout_rows(label, kind, suite, encoder, choice, parts["test"], protocol, **where)
