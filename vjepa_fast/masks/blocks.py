"""Masks of a batch of clips, as the trainer needs them."""

from __future__ import annotations

from vjepa_fast.config.checks import not_multiple, refuse, token_grid
from vjepa_fast.config.fields import require
from vjepa_fast.masks import motion
from vjepa_fast.masks.drawn import DrawnMasks
from vjepa_fast.ops.block_masks import sample_block_masks


class MaskSampler:
    """Draws the context and prediction masks of a batch; stateless, so a resumed run draws the same.

    Args:
        cfg: config.MasksConfig (``specs``, ``truncate``, ``saliency``).
        crop_size, patch_size: pixels. tubelet_size: frames.
        seed: 64-bit key of all draws.
        mean, std: of the clip's normalisation, per channel in [0, 1] units.
        compat: ``published`` normalises motion maps as the released code does.

    Raises:
        ConfigError: a field of a mask is out of range, or the crop is no multiple of the patch.
    """

    def __init__(self, cfg, *, crop_size: int, patch_size: int, tubelet_size: int, seed: int, mean, std, compat: str):
        require(cfg, "masks")
        refuse(not_multiple(crop_size, patch_size, "data.crop_size", "data.patch_size"))
        self.specs = tuple(cfg.specs)
        self.truncate = cfg.truncate
        self.saliency = cfg.saliency
        self.patch_size = patch_size
        self.tubelet_size = tubelet_size
        self.seed = seed
        self.mean, self.std = mean, std
        self.compat = compat

    def grid(self, clip_shape) -> tuple[int, int, int]:
        """(T, H, W) of a clip ``[B,C,F,Y,X]``; a single frame is one time step."""
        frames, height, width = clip_shape[2:]
        tubelet = 1 if frames == 1 else self.tubelet_size
        return token_grid(frames, height, width, tubelet=tubelet, patch=self.patch_size)

    def __call__(self, clip, *, step: int, first_sample: int, group: int = 0):
        """Masks of one group of clips.

        Args:
            clip: ``[B,C,F,Y,X]``, uint8 or normalised float; its pixels matter to motion-guided masks only.
            step: of the run. first_sample: global index of ``clip[0]`` within the step.
            group: which of a step's groups of clips (by frames per clip) this is; groups draw independently.

        Returns:
            (masks_enc, masks_pred): lists with one int64 ``[B,K]`` of ascending token indices per mask; with
            ``truncate: none`` one ``layers.Packed`` per mask, as the samples differ in length.

        Raises:
            ConfigError: no context is left, naming the mask; or the clip does not divide into tokens.
        """
        return self.draw(clip, step=step, first_sample=first_sample, group=group).wait()

    def draw(self, clip, *, step: int, first_sample: int, group: int = 0) -> DrawnMasks:
        """The same, without waiting for the device that draws them: ``DrawnMasks.wait`` gives the lists."""
        grid = self.grid(clip.shape)
        saliency = motion.guide(self.specs, clip, grid, self.mean, self.std, self.saliency, self.compat)
        masks = sample_block_masks(
            clip.shape[0],
            grid,
            self.specs,
            saliency,
            seed=self.seed,
            step=step,
            first_sample=first_sample,
            truncate=self.truncate,
            first_spec=group * len(self.specs),
            device=clip.device,
        )
        return DrawnMasks(masks, packed=self.truncate == "none")
