"""Public operators. Each picks a backend (``triton``, ``cpp``, ``eager``) and can say why; see ``backend_report``."""

from vjepa_fast.imagenet import IMAGENET_MEAN, IMAGENET_STD
from vjepa_fast.ops import add_norm as add_norm  # of layers.fused_block: registered, so that they are reported
from vjepa_fast.ops import gelu as gelu
from vjepa_fast.ops._backend import BackendError, backend_report, current_backend, use_backend
from vjepa_fast.ops.adamw import Rule, adamw_ema_, total_norm
from vjepa_fast.ops.block_masks import BlockMasks, BlockSpec, origin_probabilities, sample_block_masks
from vjepa_fast.ops.distance import mask_distance
from vjepa_fast.ops.latent import latent_loss, latent_loss_column, latent_loss_pair, latent_loss_token
from vjepa_fast.ops.norm import target_norm
from vjepa_fast.ops.packed_attention import packed_attention
from vjepa_fast.ops.patchify import normalize_clip, patch_mean, tubelet_patchify
from vjepa_fast.ops.product import cross_covariance, linear32, matmul32
from vjepa_fast.ops.rope import rope3d, rope3d_
from vjepa_fast.ops.saliency import motion_saliency

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "BackendError",
    "BlockMasks",
    "BlockSpec",
    "Rule",
    "adamw_ema_",
    "backend_report",
    "cross_covariance",
    "current_backend",
    "latent_loss",
    "latent_loss_column",
    "latent_loss_pair",
    "latent_loss_token",
    "linear32",
    "mask_distance",
    "matmul32",
    "motion_saliency",
    "normalize_clip",
    "origin_probabilities",
    "packed_attention",
    "patch_mean",
    "rope3d",
    "rope3d_",
    "sample_block_masks",
    "target_norm",
    "total_norm",
    "tubelet_patchify",
    "use_backend",
]
