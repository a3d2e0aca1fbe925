"""The study's variants as data: what each changes of the baseline, read from the published recipes.

No value is typed here. A variant is the difference between its recipe and the baseline recipe of the same data
(objectives, mask fields, target mode), so it can be put on the baseline of any suite.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, field

from vjepa_fast.errors import ConfigError, UserError

HEAD_TERMS = ("ld", "ac", "hamiltonian")  # terms with a head whose hidden width is held to the encoder's


@dataclass(frozen=True)
class Variant:
    """One objective of the study. ``recipe``: where its values are; ``without``: terms of the recipe left out."""

    name: str
    text: str
    recipe: str
    counted: bool = True  # one of the 18 comparisons with the baseline
    without: tuple[str, ...] = ()


def _mixed(name: str, text: str, **more) -> Variant:
    return Variant(name, text, f"mixed_4gpu_{name}", **more)


def _single(name: str, text: str, **more) -> Variant:
    return Variant(name, text, f"ucf101_4gpu_{name}", **more)


_ALL = (
    _mixed("baseline", "prediction and distance-weighted context loss", counted=False),
    _mixed("motion_guided", "motion-guided masks, strength 2"),
    _mixed("amg", "aggressive motion-guided masks, strength 5, no random share"),
    _mixed("hw", "hard-region weighting"),
    _mixed("delta", "temporal difference matching"),
    _mixed("fwm", "factored world model: static appearance half, orthogonal dynamics half"),
    _mixed("ld", "latent dynamics"),
    _mixed("fwm_ld", "FWM with latent dynamics on the dynamics half"),
    _mixed("hw_ld", "hard-region weighting with latent dynamics"),
    _mixed("fwm_hw_ld", "the headline: FWM, hard regions and latent dynamics"),
    _mixed("combo", "temporal difference, hard regions and aggressive motion-guided masks"),
    _mixed("spectral", "spectral matching over time"),
    _mixed("ltc", "temporal contrast of the features"),
    _mixed("ac", "change of patch colours from the context features"),
    _mixed("ac_hw", "AC with hard-region weighting"),
    _mixed("fac", "FWM with AC on the dynamics half"),
    _single("kinematic", "kinematic smoothness of the features, without EMA"),
    _single("velgate", "velocity gate"),
    _single("hamiltonian", "Hamiltonian dynamics of the features"),
    Variant("fwm_hw", "control: the headline without latent dynamics", "mixed_4gpu_fwm_hw_ld", False, ("ld",)),
    *(
        _single(name, text, counted=False)
        for name, text in (
            ("sigreg", "SIGReg"),
            ("sigreg_no_ema", "SIGReg without EMA"),
            ("future_predictive", "the later half of the clip from the earlier"),
            ("motion_future", "future prediction with motion-guided masks"),
            ("kinematic_0_1", "kinematic smoothness, coefficient 0.1"),
            ("kinematic_huber", "kinematic smoothness with a Huber loss"),
            ("kinematic_accel", "kinematic smoothness of second differences"),
            ("kinematic_split", "kinematic smoothness of half of the channels"),
            ("kinematic_anneal", "kinematic smoothness of second differences, annealed"),
        )
    ),
)
VARIANTS: dict[str, Variant] = {v.name: v for v in _ALL}
COUNTED: tuple[str, ...] = tuple(v.name for v in _ALL if v.counted)
CONTROL = "fwm_hw"
DEFAULT: tuple[str, ...] = ("baseline", *COUNTED, CONTROL)  # what `--variants all` runs


@dataclass(frozen=True)
class Changes:
    """What a variant changes of a baseline: terms, fields of each mask spec, fields of the target section."""

    objectives: dict[str, dict] = field(default_factory=dict)
    masks: tuple[dict, ...] = ()
    target: dict = field(default_factory=dict)


def find(name: str) -> Variant:
    """The variant of that name; UserError with the known names otherwise."""
    if name not in VARIANTS:
        raise UserError(f"{name}: no variant of that name; known: all, {', '.join(VARIANTS)}")
    return VARIANTS[name]


def names(text: str) -> list[str]:
    """The variants of ``all`` or ``a,b,c``, in the study's order, each once. Raises UserError for an unknown name."""
    asked = [part.strip() for part in text.split(",") if part.strip()]
    if not asked:
        raise UserError("no variant is named; give all or a list such as baseline,fwm_hw_ld")
    asked = {name for part in asked for name in (DEFAULT if part == "all" else (find(part).name,))}
    return [name for name in VARIANTS if name in asked]


@functools.cache
def changes(name: str) -> Changes:
    """The differences between the variant's recipe and the baseline recipe of the same data."""
    from vjepa_fast import config

    variant = find(name)
    cfg = config.load(variant.recipe)
    base = config.load(f"{variant.recipe.split('_4gpu_')[0]}_4gpu_baseline")
    terms = {t: f for t, f in cfg.objectives.items() if base.objectives.get(t) != f and t not in variant.without}
    masks = tuple(_differing(spec, below) for spec, below in zip(cfg.masks.specs, base.masks.specs, strict=True))
    return Changes(terms, masks if any(masks) else (), _differing(cfg.target, base.target))


def _differing(section, base) -> dict:
    values = {f.name: getattr(section, f.name) for f in dataclasses.fields(section)}
    return {k: v for k, v in values.items() if v != getattr(base, k)}


def apply(name: str, cfg):
    """``cfg`` (a suite's baseline Config) with the variant's changes.

    Heads are made no wider than the encoder (a recipe's 256 is a third of ViT-B's width). Under ``compat: published``
    motion maps exist for batches of 1 or T clips only (ops.motion_saliency), so a batch becomes micro-batches of T
    clips whose gradients are averaged: as many clips per optimiser step as the other runs see.

    Raises:
        ConfigError: the baseline has another number of masks; a published batch cannot be split so.
    """
    found = changes(name)
    objectives = {term: dict(fields) for term, fields in {**cfg.objectives, **found.objectives}.items()}
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
