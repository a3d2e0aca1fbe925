"""Nearest prototype: the mean of a class's shots stands for the class.

Shapes: e episodes, W ways, S shots, N = W*S, M queries of an episode.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vjepa_fast.evaluation.choices import check_choice
from vjepa_fast.evaluation.extract.features import Features
from vjepa_fast.evaluation.fewshot.episodes import EpisodeOptions, EpisodeResult, Products, run_episodes

if TYPE_CHECKING:
    from typing_extensions import Unpack

METRICS = ("cosine", "euclidean")


def prototype_scores(products: Products, way: int, metric: str) -> Tensor:
    """``[e, M, W]``: cosine of the query with the prototype times the query's norm, or minus the squared distance plus
    the query's squared norm; what is added or multiplied does not change which prototype wins.
    """
    with_proto_eMW = products.qs.unflatten(2, (way, -1)).mean(3)
    own_eSSW = products.ss.unflatten(2, (way, -1)).unflatten(1, (way, -1)).diagonal(dim1=1, dim2=3)
    square_e1W = own_eSSW.mean((1, 2)).unsqueeze(1)  # squared norm of the mean of the shots
    if metric == "euclidean":
        return 2 * with_proto_eMW - square_e1W
    # shots that cancel each other leave a prototype of rounding errors (float32's): no direction, so a cosine of 0
    rounding = 1e-6 * own_eSSW.diagonal(dim1=1, dim2=2).mean(2).unsqueeze(1)
    return with_proto_eMW * torch.where(square_e1W > rounding, square_e1W.clamp_min(1e-30).rsqrt(), 0.0)


def prototype_episodes(
    features: Features,
    way: int = 5,
    shot: int = 1,
    queries: int = 15,
    episodes: int = 1000,
    seed: int = 0,
    metric: str = "cosine",
    **options: Unpack[EpisodeOptions],
) -> EpisodeResult:
    """Accuracy of nearest-prototype classification over random episodes, with its 95 % interval.

    A prototype is the mean of the shots. ``metric="cosine"`` compares it with the query by cosine (Meta-Baseline,
    arXiv:2003.04390, section 3: the shots are not normalised), ``"euclidean"`` by distance (Prototypical Networks,
    arXiv:1703.05175). ``center`` and ``l2`` are applied first, in this order, to shots and queries alike (SimpleShot,
    arXiv:1911.04623: ``center="base", l2=True, metric="euclidean"`` is its CL2N): "base" takes off the mean of
    ``base``, "shots" the mean of the episode's shots. Episodes: :func:`sample_episodes`. All of a chunk are one
    batched product. Raises DataError and ConfigError as :func:`~.episodes.run_episodes`.
    """
    check_choice("metric", metric, METRICS)
    return run_episodes(
        features,
        lambda products: prototype_scores(products, way, metric),
        *(way, shot, queries, episodes, seed),
        any_origin=metric == "euclidean",
        **options,
    )
