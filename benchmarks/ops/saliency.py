"""motion_saliency, alone and with the masks that follow it."""

from __future__ import annotations

from benchmarks.ops._inputs import GRID, MEAN, SPECS, STD, Case, Inputs, N, eager_code, forced
from vjepa_fast import ops, reference


def motion_saliency(x: Inputs, mode: str = "trilinear") -> Case:
    """The reference takes the normalised float clip, as the published collator gets it; its conversion is not timed."""
    clip = x.clip()
    normal = ops.normalize_clip(clip)

    def published():
        return reference.motion_map(normal, GRID, per_sample=True)

    def ours():
        return ops.motion_saliency(clip, GRID, MEAN, STD, mode)

    def plain():
        return eager_code("motion_saliency")(clip, list(GRID), list(STD), mode, "sample")

    functions = {"reference": published, "eager": plain, "fused": ours}
    if mode != "trilinear":
        del functions["reference"]  # the published code has no such mode
    pixels = clip.numel() if mode == "area" else x.batch * N * 3 * 8 * 2
    return Case(
        "motion_saliency", f"B{x.batch} clip {mode}", functions, compile_=plain, floor_bytes=pixels + x.batch * N * 4
    )


def guided_masks(x: Inputs) -> Case:
    """Motion maps and masks of both specs, from the clip to dense index lists; the reference is the published collator.

    The reference takes the normalised float clip on the CPU, and the copy into it is not timed. Masks differ: other
    generators.
    """
    clip = x.clip()
    normal = ops.normalize_clip(clip).cpu()
    fields = ("num_blocks", "spatial_scale", "temporal_scale", "aspect_ratio")
    configs = [{**{f: getattr(s, f) for f in fields}, "motion_guided": True} for s in SPECS]
    collator = reference.MaskCollator(configs, GRID, per_sample_motion=True)
    specs = tuple(ops.BlockSpec(**c) for c in configs)

    def ours():
        saliency = ops.motion_saliency(clip, GRID, MEAN, STD)
        masks = ops.sample_block_masks(x.batch, GRID, specs, saliency, seed=0, step=3, device=x.device)
        return masks.trim()[0] if x.device.type == "cpu" else masks.enc  # on a GPU lengths travel while it goes on

    return Case(
        "guided_masks",
        f"B{x.batch} clip, 2 masks",
        {"reference": lambda: collator(normal)[0], "eager": forced("eager", ours), "fused": ours},
        compare=False,
        on_host=("reference",),
    )


CASES = {
    "motion_saliency": motion_saliency,
    "motion_saliency_area": lambda x: motion_saliency(x, "area"),
    "guided_masks": guided_masks,
}
