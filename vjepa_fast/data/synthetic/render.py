"""One clip of a suite: frames, label and the attributes it was drawn with. Pure numpy, a few milliseconds each."""

from __future__ import annotations

import math

import numpy as np

from vjepa_fast.data.synthetic import raster
from vjepa_fast.data.synthetic.suites import (
    COLOURS,
    SUITES,
    Dive,
    FewShot,
    Motion8,
    Objects,
    Order,
    Suite,
    TextureConfig,
)


def render_clip(
    suite: str | Suite, rng: np.random.Generator, size: int = 64, frames: int = 16, label: int | None = None
) -> tuple[np.ndarray, int, dict]:
    """Render one clip.

    Args:
        suite: a name (motion8, dive, order, objects, fewshot) or a suite's dataclass with other parameters.
        rng: everything random comes from it, and never depends on ``label``: the same generator state with two
            labels gives the same appearance.
        size: pixels of each side.
        frames: number of frames; ``objects`` always gives one.
        label: the class; None draws one.

    Returns:
        frames uint8 ``[F, size, size, 3]``, the label, and a dict of plain values that describe the clip.
    """
    suite = SUITES[suite] if isinstance(suite, str) else suite
    drawn = int(rng.integers(len(suite.classes)))
    label = drawn if label is None else int(label)
    if not 0 <= label < len(suite.classes):
        raise ValueError(f"label {label} of suite {suite.name}: it has the classes 0 to {len(suite.classes) - 1}")
    clip, attributes = _RENDERERS[type(suite)](suite, rng, size, frames, label)
    return raster.to_uint8(clip), label, {"class": suite.classes[label], **attributes}


def _scene(rng: np.random.Generator, config: TextureConfig, size: int, side: int) -> np.ndarray:
    unit = size / 64.0
    return raster.texture(rng, side, config.coarse * unit, config.fine * unit, config.contrast, config.grey)


def _skin(rng: np.random.Generator) -> np.ndarray:
    return raster.texture(rng, 48, coarse=24.0, fine=6.0, contrast=0.3)


def _still(background: np.ndarray, frames: int) -> np.ndarray:
    return np.repeat(background[None], frames, axis=0)


def _motion8(suite: Motion8, rng, size: int, frames: int, label: int):
    unit, side = size / 64.0, 2 * size
    canvas = _scene(rng, suite.background, size, side)[None]
    for _ in range(suite.sprites):
        shape = raster.SHAPES[int(rng.integers(len(raster.SHAPES)))]
        name = raster.PATTERNS[int(rng.integers(len(raster.PATTERNS)))]
        radius = rng.uniform(*suite.sprite_radius, 1) * unit
        centre = rng.uniform(radius, side - radius, (1, 2)) if side > 2 * radius else np.full((1, 2), side / 2)
        raster.draw(canvas, shape, centre, radius, rng.uniform(0, 2 * math.pi, 1), raster.random_colours(rng), name)
    speed = rng.uniform(*suite.speed)
    start = rng.uniform(0, side, 2)
    gain = 1.0 + suite.brightness_jitter * rng.standard_normal((frames, 1, 1, 1), dtype=np.float32)
    angle = label * math.pi / 4
    velocity = speed * unit * np.array([math.sin(angle), math.cos(angle)])
    offsets = start - np.arange(frames)[:, None] * velocity  # the window moves against the scene
    clip = raster.pan(canvas[0], offsets, size)
    return (clip * gain if suite.brightness_jitter else clip), {"speed": float(speed * unit)}


def _ramp(frames: int, start: float, end: float) -> np.ndarray:
    """0 before ``start``, 1 after ``end`` (fractions of the clip), a straight line between."""
    t = np.arange(frames) / max(1, frames - 1)
    return np.clip((t - start) / max(1e-6, end - start), 0.0, 1.0)


def _dive(suite: Dive, rng, size: int, frames: int, label: int):
    unit = size / 64.0
    clip = _still(_scene(rng, suite.background, size, size), frames)
    skin, shape = _skin(rng), raster.SHAPES[int(rng.integers(len(raster.SHAPES)))]
    growth = math.log(suite.scale) * rng.choice([-1.0, 1.0])
    radius = rng.uniform(*suite.radius) * unit
    heading, angle = rng.uniform(0, 2 * math.pi, 2)
    sense = rng.choice([-1.0, 1.0])
    cuts = np.array([1, 2]) / 3 + rng.uniform(-1, 1, 2) * suite.boundary_jitter
    step = suite.translate * unit * np.array([math.sin(heading), math.cos(heading)])
    room = np.maximum(0.0, size / 2 - radius * math.exp(abs(growth) / 2) - np.abs(step) / 2)
    middle = size / 2 + rng.uniform(-1, 1, 2) * room

    edges = (0.0, *cuts, 1.0)
    ramps = {name.split("-")[0]: _ramp(frames, edges[i], edges[i + 1]) for i, name in enumerate(suite.triples[label])}
    if suite.rotation_senses == 2:
        sense = 1.0 if "rotate-cw" in suite.triples[label] else -1.0
    centre = middle + (ramps["translate"] - 0.5)[:, None] * step
    angles = angle + sense * math.radians(suite.rotate) * ramps["rotate"]
    radii = radius * np.exp(growth * (ramps["scale"] - 0.5))
    raster.draw(clip, shape, centre, radii, angles, raster.random_colours(rng), skin=skin)
    return clip, {"shape": shape, "grows": bool(growth > 0), "heading": float(heading), "cuts": cuts.tolist()}


def order_pose(suite: Order, pair: tuple[str, str], times: np.ndarray, frames: int) -> dict[str, np.ndarray]:
    """Strength 0..1 of every event in every frame, for the pair's events centred at ``times`` (of the clip's length).
    An event is a symmetric bump, so that the pose of the reversed pair at 1 - times is the pose reversed.
    """
    t = np.arange(frames) / max(1, frames - 1)
    bumps = {}
    for name, centre in zip(pair, times, strict=True):
        phase = np.clip((t - centre) / suite.length, -0.5, 0.5)
        bumps[name] = 0.5 + 0.5 * np.cos(2 * math.pi * phase)
    return bumps


def _order(suite: Order, rng, size: int, frames: int, label: int):
    unit = size / 64.0
    clip = _still(_scene(rng, suite.background, size, size), frames)
    skin, shape = _skin(rng), raster.SHAPES[int(rng.integers(len(raster.SHAPES)))]
    radius = rng.uniform(*suite.radius) * unit
    heading, angle = rng.uniform(0, 2 * math.pi, 2)
    sense = rng.choice([-1.0, 1.0])
    times = np.array([0.25, 0.75]) + rng.uniform(-1, 1, 2) * suite.time_jitter
    step = suite.hop * unit * np.array([math.sin(heading), math.cos(heading)])
    room = np.maximum(0.0, size / 2 - radius * (1 + suite.pulse) - np.abs(step) / 2)
    middle = size / 2 + rng.uniform(-1, 1, 2) * room - step / 2

    bumps = order_pose(suite, suite.pairs[label], times, frames)
    rest = np.zeros(frames)
    centre = middle + bumps.get("hop", rest)[:, None] * step
    radii = radius * (1 + suite.pulse * bumps.get("pulse", rest))
    angles = angle + sense * math.radians(suite.wiggle) * bumps.get("wiggle", rest)
    gain = 1 + suite.flash * bumps.get("flash", rest)
    raster.draw(clip, shape, centre, radii, angles, raster.random_colours(rng), skin=skin, gain_F=gain)
    return clip, {"shape": shape, "times": times.tolist()}


def _jittered(rng, name: str, amount: float) -> tuple[np.ndarray, np.ndarray]:
    """A named colour with its own random cast, and a dark companion for patterns."""
    colour = np.clip(np.array(COLOURS[name]) + amount * rng.standard_normal(3), 0, 1)
    return colour.astype(np.float32), (0.25 * colour).astype(np.float32)


def _objects(suite: Objects, rng, size: int, frames: int, label: int):
    unit = size / 64.0
    shape, name, colour = suite.combinations[label]
    clip = _still(_scene(rng, suite.background, size, size), 1)
    radius = rng.uniform(*suite.radius, 1) * unit
    centre = size / 2 + rng.uniform(-1, 1, (1, 2)) * np.maximum(0.0, size / 2 - radius)
    angle = rng.uniform(0, 2 * math.pi, 1)
    raster.draw(clip, shape, centre, radius, angle, _jittered(rng, colour, suite.colour_jitter), name)
    return clip, {"shape": shape, "texture": name, "colour": colour, "radius": float(radius[0])}


def _fewshot(suite: FewShot, rng, size: int, frames: int, label: int):
    unit = size / 64.0
    (shape, colour), motion = suite.appearances[label // len(suite.motions)], suite.motions[label % len(suite.motions)]
    clip = _still(_scene(rng, suite.background, size, size), frames)
    name = raster.PATTERNS[1 + int(rng.integers(len(raster.PATTERNS) - 1))]
    radius, angle = rng.uniform(*suite.radius) * unit, rng.uniform(0, 2 * math.pi)
    spread, sense = rng.uniform(-1, 1, 2), rng.choice([-1.0, 1.0])
    colours = _jittered(rng, colour, suite.colour_jitter)

    ramp = _ramp(frames, 0.0, 1.0) - 0.5
    heading = {"right": (0, 1), "down": (1, 0), "left": (0, -1), "up": (-1, 0)}.get(motion, (0, 0))
    step = suite.travel * unit * np.array(heading)
    room = np.maximum(0.0, size / 2 - radius * math.sqrt(suite.grow) - suite.travel * unit / 2)
    centre = size / 2 + spread * room + ramp[:, None] * step
    angles = angle + (sense * math.radians(suite.rotate) * ramp if motion == "rotate" else np.zeros(frames))
    radii = radius * (suite.grow**ramp if motion == "grow" else np.ones(frames))
    raster.draw(clip, shape, centre, radii, angles, colours, name)
    return clip, {"shape": shape, "colour": colour, "texture": name, "motion": motion}


_RENDERERS = {Motion8: _motion8, Dive: _dive, Order: _order, Objects: _objects, FewShot: _fewshot}
