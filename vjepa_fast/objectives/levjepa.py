"""The loss of LeVJEPA (arXiv:2608.27395): embeddings of the views of a clip agree, those of many clips look Gaussian.

Legend: V views of each clip, the global one first; B clips; C channels of an embedding; S directions.
"""

from __future__ import annotations

from torch import Tensor

from vjepa_fast import ops
from vjepa_fast.objectives.epps_pulley import POINTS, Together, directions, epps_pulley


def invariance(embeddings_VBC: Tensor) -> Tensor:
    """Mean over views, clips and channels of (global embedding - embedding of the view)^2, a 0-d tensor.

    Gradient reaches both sides. The global view is one of the V, with a distance of 0 (as the mean over all views of
    LeJEPA, arXiv:2511.08544, with one global view).
    """
    return (embeddings_VBC[:1] - embeddings_VBC).square().mean()


def sigreg(embeddings_VBC: Tensor, normal_CS: Tensor, points: int = POINTS, together: Together | None = None) -> Tensor:
    """Epps-Pulley statistic of the B embeddings of each view, times the clips; mean over views and directions.

    Args:
        embeddings_VBC: float32 or float64.
        normal_CS: normal numbers, whose columns are scaled to unit directions.
        points: of the integral, see `epps_pulley`.
        together: processes whose clips are looked at as one batch, see `epps_pulley`.
    """
    u_VBS = ops.matmul32(embeddings_VBC.flatten(0, 1), directions(normal_CS)).unflatten(0, embeddings_VBC.shape[:2])
    return epps_pulley(u_VBS.transpose(0, 1).flatten(1), points=points, together=together).mean()
