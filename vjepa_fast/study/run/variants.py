"""The study's variants as data: what each changes of the baseline, read from the published recipes.

No value is typed here. A variant is the difference between its recipe and the baseline recipe of the same data
(objectives, mask fields, target mode), so it can be put on the baseline of any suite. Two are no V-JEPA: masked pixels,
whose term replaces those of the baseline, and LeVJEPA, whose recipe is put on the baseline's data, encoder and steps.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, field

from vjepa_fast.errors import ConfigError, UserError

HEAD_TERMS = ("ld", "ac", "hamiltonian")  # terms with a head whose hidden width is held to the encoder's


# The 18 comparisons with the baseline: of the published runs on mixed data, then on UCF-101 alone. A name has the loss
# terms that are added (hw: hard-region weighting, ld: latent dynamics, fwm: factored world model, ac: change of patch
# colours, fac: fwm with ac, ltc: temporal contrast, delta: temporal differences; combo: delta, hw and amg) or the masks
# (motion_guided, amg: aggressively so).
COUNTED = (
    *("motion_guided", "amg", "hw", "delta", "fwm", "ld", "fwm_ld", "hw_ld", "fwm_hw_ld"),
    *("combo", "spectral", "ltc", "ac", "ac_hw", "fac"),
    *("kinematic", "velgate", "hamiltonian"),
)
CONTROL = "fwm_hw"  # the headline fwm_hw_ld without latent dynamics, which the paper lacks
PIXELS = "pixels"  # masked pixels in place of the latent target: the competitor of every latent objective
DEFAULT = ("baseline", *COUNTED, CONTROL, PIXELS)  # what `--variants all` runs
OTHERS = (
    *("sigreg", "sigreg_no_ema", "future_predictive", "motion_future"),
    *("kinematic_0_1", "kinematic_huber", "kinematic_accel", "kinematic_split", "kinematic_anneal"),
)
RIVAL = "levjepa"  # by its recipe for small clips, or for those of at least the published size
RIVAL_PUBLISHED = "levjepa_vitb"
OTHER_METHODS = (PIXELS, RIVAL)  # no V-JEPA: in every table, but not in means over variants
# name -> the recipe that has its values
VARIANTS: dict[str, str] = {
    **{name: f"mixed_4gpu_{name}" for name in ("baseline", *COUNTED[:-3])},
    **{name: f"ucf101_4gpu_{name}" for name in COUNTED[-3:]},
    CONTROL: "mixed_4gpu_fwm_hw_ld",
    **{name: f"ucf101_4gpu_{name}" for name in OTHERS},
    PIXELS: "laptop_pixels",
    RIVAL: "levjepa_small",
}


@dataclass(frozen=True)
class Changes:
    """What a variant changes of a baseline: terms, fields of each mask spec, fields of the target section."""

    objectives: dict[str, dict] = field(default_factory=dict)
    masks: tuple[dict, ...] = ()
    target: dict = field(default_factory=dict)
    replaces: bool = False  # the baseline's terms are left out


def names(text: str) -> list[str]:
    """The variants of ``all`` or ``a,b,c``, in the study's order, each once. Raises UserError for an unknown name."""
    asked = [part.strip() for part in text.split(",") if part.strip()]
    if not asked:
        raise UserError("no variant is named; give all or a list such as baseline,fwm_hw_ld")
    for name in asked:
        if name not in ("all", *VARIANTS):
            raise UserError(f"{name}: no variant of that name; known: all, {', '.join(VARIANTS)}")
    chosen = {*asked, *(DEFAULT if "all" in asked else ())}
    return [name for name in VARIANTS if name in chosen]


@functools.cache
def changes(name: str) -> Changes:
    """The differences between the variant's recipe and the baseline recipe of the same data."""
    from vjepa_fast import config

    cfg = config.load(VARIANTS[name])
    base = config.load("laptop_vjepa" if name == PIXELS else f"{VARIANTS[name].split('_4gpu_')[0]}_4gpu_baseline")
    without = ("ld",) if name == CONTROL else ()
    terms = {t: f for t, f in cfg.objectives.items() if base.objectives.get(t) != f and t not in without}
    masks = tuple(_differing(spec, below) for spec, below in zip(cfg.masks.specs, base.masks.specs, strict=True))
    return Changes(terms, masks if any(masks) else (), _differing(cfg.target, base.target), name == PIXELS)


def _differing(section, base) -> dict:
    values = {f.name: getattr(section, f.name) for f in dataclasses.fields(section)}
    return {k: v for k, v in values.items() if v != getattr(base, k)}


def apply(name: str, cfg):
    """``cfg`` (a suite's baseline Config) with the variant's changes.

    Heads are made no wider than the encoder (a recipe's 256 is a third of ViT-B's width). Under ``compat: published``
    motion maps exist for batches of 1 or T clips only (ops.motion_saliency), so a batch becomes micro-batches of T
    clips whose gradients are averaged: as many clips per optimiser step as the other runs see. Raises ConfigError
    where the baseline has another number of masks, a published batch cannot be split so, or another method is asked to
    be as published by the study, which has no such runs.
    """
    if name in OTHER_METHODS and cfg.compat == "published":
        raise ConfigError(f"{name}: no run of the study was published; leave it out of --published")
    if name == RIVAL:
        return _rival(cfg)
    found = changes(name)
    kept = {} if found.replaces else cfg.objectives
    objectives = {term: dict(fields) for term, fields in {**kept, **found.objectives}.items()}
    for term in HEAD_TERMS:
        if term in objectives and cfg.model.embed_dim is not None:
            hidden = objectives[term].get("hidden_dim", 256)
            objectives[term]["hidden_dim"] = min(hidden, cfg.model.embed_dim)
    specs = cfg.masks.specs
    if found.masks:
        if len(specs) != len(found.masks):
            raise ConfigError(f"{name}: changes {len(found.masks)} masks, the suite's baseline has {len(specs)}")
        specs = tuple(dataclasses.replace(spec, **more) for spec, more in zip(specs, found.masks))
    cfg = dataclasses.replace(
        cfg,
        objectives=objectives,
        masks=dataclasses.replace(cfg.masks, specs=specs),
        target=dataclasses.replace(cfg.target, **found.target),
    )
    guided = any(spec.motion_guided for spec in specs)
    return _micro_batches(name, cfg) if guided and cfg.compat == "published" else cfg


def _rival(cfg):
    """LeVJEPA on the data, encoder size and steps of ``cfg``: views, loss and optimiser are its recipe's.

    Local views are the share of the crop that they are in the recipe, to the next patch; a clip's time steps are the
    recipe's tubelets.
    """
    from vjepa_fast import config

    recipe = config.load(RIVAL_PUBLISHED)
    if cfg.data.crop_size < recipe.data.crop_size:
        recipe = config.load(VARIANTS[RIVAL])
    share, patch = recipe.levjepa.local_crop / recipe.data.crop_size, cfg.data.patch_size
    local = patch * max(1, round(share * cfg.data.crop_size / patch))
    size = {key: getattr(cfg.model, key) for key in ("model_name", "embed_dim", "depth", "num_heads")}
    length = {key: getattr(cfg.optimization, key) for key in ("epochs", "ipe", "ipe_scale", "accumulate")}
    warmup = recipe.optimization.warmup * cfg.optimization.epochs / recipe.optimization.epochs
    every = min(recipe.levjepa.average_every, cfg.optimization.epochs * cfg.optimization.ipe)
    return dataclasses.replace(
        recipe,
        data=dataclasses.replace(cfg.data, tubelet_size=recipe.data.tubelet_size),
        data_aug=dataclasses.replace(recipe.data_aug, mean=cfg.data_aug.mean, std=cfg.data_aug.std),
        levjepa=dataclasses.replace(recipe.levjepa, local_crop=local, average_every=every),
        model=dataclasses.replace(recipe.model, **size),
        optimization=dataclasses.replace(recipe.optimization, **length, warmup=warmup),
        runtime=cfg.runtime,
        seed=cfg.seed,
        folder=cfg.folder,
    )


def _micro_batches(name: str, cfg):
    times, batch = max(cfg.data.dataset_fpcs) // cfg.data.tubelet_size, cfg.data.batch_size
    if batch in (1, times):
        return cfg
    if batch % times:
        near = max(1, round(batch / times)) * times
        raise ConfigError(
            f"{name}: compat published has motion maps for batches of 1 or {times} clips only, and data.batch_size "
            f"{batch} is no multiple of {times}; --set data.batch_size={near}, or leave the variant out of --published"
        )
    accumulate = cfg.optimization.accumulate * (batch // times)
    return dataclasses.replace(
        cfg,
        data=dataclasses.replace(cfg.data, batch_size=times),
        optimization=dataclasses.replace(cfg.optimization, accumulate=accumulate),
    )
