"""The suites that come with the package: parameters, classes and drawing of each. Pure numpy, milliseconds a clip.

Lengths are pixels of a 64-pixel frame and scale with the frame. Appearance is drawn apart from the label wherever the
label is a motion, and motion wherever it is an appearance.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np

from vjepa_fast.data.synthetic import raster
from vjepa_fast.data.synthetic.api import SUITES, Rendered, Suite
from vjepa_fast.data.synthetic.raster import PATTERNS, SHAPES

DIRECTIONS = ("E", "SE", "S", "SW", "W", "NW", "N", "NE")
EVENTS = ("hop", "pulse", "wiggle", "flash")
COLOURS = {
    "red": (0.85, 0.15, 0.12),
    "green": (0.15, 0.72, 0.2),
    "blue": (0.15, 0.3, 0.9),
    "yellow": (0.92, 0.85, 0.15),
    "purple": (0.6, 0.15, 0.75),
    "white": (0.95, 0.95, 0.95),
}
MOTIONS = ("right", "down", "left", "up", "rotate", "grow")
CHANGES = ("none", "turn-right", "turn-left", "grow", "shrink", "pulse")


@dataclass(frozen=True)
class TextureConfig:
    """Band-limited background: longest and shortest wavelength, and contrast (standard deviation, 0..1)."""

    coarse: float = 32.0
    fine: float = 8.0
    contrast: float = 0.18
    grey: bool = False  # one field for all three channels about mid-grey: every texture has the same mean and contrast

    def draw(self, rng: np.random.Generator, size: int, side: int) -> np.ndarray:
        """Float32 ``[side, side, 3]`` in 0..1 for frames of ``size`` pixels."""
        unit = size / 64.0
        return raster.texture(rng, side, self.coarse * unit, self.fine * unit, self.contrast, self.grey)


def _skin(rng: np.random.Generator) -> np.ndarray:
    return raster.texture(rng, 48, coarse=24.0, fine=6.0, contrast=0.3)


def _still(background: np.ndarray, frames: int) -> np.ndarray:
    return np.repeat(background[None], frames, axis=0)


def _ramp(frames: int, start: float, end: float) -> np.ndarray:
    """0 before ``start``, 1 after ``end`` (fractions of the clip), a straight line between."""
    t = np.arange(frames) / max(1, frames - 1)
    return np.clip((t - start) / max(1e-6, end - start), 0.0, 1.0)


def _jittered(rng: np.random.Generator, name: str, amount: float) -> tuple[np.ndarray, np.ndarray]:
    """A named colour with its own random cast, and a dark companion for patterns."""
    colour = np.clip(np.array(COLOURS[name]) + amount * rng.standard_normal(3), 0, 1)
    return colour.astype(np.float32), (0.25 * colour).astype(np.float32)


@dataclass(frozen=True)
class Motion8(Suite):
    """Eight directions: a whole textured scene pans in the direction of the label, as a random-dot kinematogram does.

    The texture is new in every clip, and so are its hues: as colourful as the backgrounds of ``fewshot``, with none of
    its shapes. ``sprites`` shapes in random colours can ride on it.
    """

    speed: tuple[float, float] = (1.5, 3.5)  # pixels per frame
    sprites: int = 0  # in the whole scene, of which about a quarter is seen at a time
    sprite_radius: tuple[float, float] = (6.0, 12.0)
    brightness_jitter: float = 0.0  # standard deviation of a gain per frame
    background: TextureConfig = TextureConfig(coarse=24.0, contrast=0.2)
    name = "motion8"

    @property
    def classes(self) -> tuple[str, ...]:
        """Compass directions, clockwise from east."""
        return DIRECTIONS

    def render(self, rng: np.random.Generator, size: int, frames: int, label: int) -> Rendered:
        """As `Suite.render`; the attribute is the speed in pixels per frame."""
        unit, side = size / 64.0, 2 * size
        canvas = self.background.draw(rng, size, side)[None]
        for _ in range(self.sprites):
            shape = raster.SHAPES[int(rng.integers(len(raster.SHAPES)))]
            name = raster.PATTERNS[int(rng.integers(len(raster.PATTERNS)))]
            radius = rng.uniform(*self.sprite_radius, 1) * unit
            centre = rng.uniform(radius, side - radius, (1, 2)) if side > 2 * radius else np.full((1, 2), side / 2)
            raster.draw(canvas, shape, centre, radius, rng.uniform(0, 2 * math.pi, 1), raster.random_colours(rng), name)
        speed = rng.uniform(*self.speed)
        start = rng.uniform(0, side, 2)
        gain = 1.0 + self.brightness_jitter * rng.standard_normal((frames, 1, 1, 1), dtype=np.float32)
        angle = label * math.pi / 4
        velocity = speed * unit * np.array([math.sin(angle), math.cos(angle)])
        offsets = start - np.arange(frames)[:, None] * velocity  # the window moves against the scene
        clip = raster.pan(canvas[0], offsets, size)
        return (clip * gain if self.brightness_jitter else clip), {"speed": float(speed * unit)}


@dataclass(frozen=True)
class Dive(Suite):
    """Ordered triples of primitives: each of translate, rotate, scale once. The order is the class, 6 of them; with
    ``rotation_senses = 2`` clockwise and anticlockwise are classes apart, 12 of them. Every class holds the same
    primitives with the same amounts, so that no single frame shows which. Drawn apart from the label: the direction of
    translation, within ``headings`` of the right, and for ``shrinks`` whether the object grows.
    """

    rotation_senses: int = 1  # 1: the sense is drawn apart from the label
    translate: float = 26.0  # pixels
    rotate: float = 140.0  # degrees
    scale: float = 2.2  # factor, or its inverse
    radius: tuple[float, float] = (11.0, 13.0)  # geometric mean of the radii before and after scaling
    shrinks: bool = False  # half of the objects shrink, drawn apart from the label
    headings: float = 60.0  # degrees to either side; 180: all directions
    boundary_jitter: float = 0.04  # of the clip's length, about 1/3 and 2/3
    background: TextureConfig = TextureConfig(contrast=0.05, grey=True)
    name = "dive"

    @property
    def triples(self) -> tuple[tuple[str, ...], ...]:
        """The three primitives of each class in their order."""
        turns = ("rotate",) if self.rotation_senses == 1 else ("rotate-cw", "rotate-ccw")
        return tuple(t for turn in turns for t in itertools.permutations(("translate", turn, "scale")))

    @property
    def classes(self) -> tuple[str, ...]:
        """The triples, joined by ``>``."""
        return tuple(">".join(t) for t in self.triples)

    @property
    def factors(self) -> tuple[tuple[int, ...], ...]:
        """Which primitive comes first, second and third, and the sense of rotation."""
        primitives, senses = ("translate", "rotate", "scale"), ("rotate", "rotate-cw", "rotate-ccw")
        return tuple(
            (*(primitives.index(p.split("-")[0]) for p in triple), senses.index(next(p for p in triple if p in senses)))
            for triple in self.triples
        )

    def render(self, rng: np.random.Generator, size: int, frames: int, label: int) -> Rendered:
        """As `Suite.render`; attributes: shape, growing or shrinking, direction (radians), the two times of change."""
        unit = size / 64.0
        clip = _still(self.background.draw(rng, size, size), frames)
        skin, shape = _skin(rng), raster.SHAPES[int(rng.integers(len(raster.SHAPES)))]
        sign = rng.choice([-1.0, 1.0])
        growth = math.log(self.scale) * (sign if self.shrinks else 1.0)
        radius = rng.uniform(*self.radius) * unit
        heading, angle = rng.uniform(0, 2 * math.pi, 2)
        heading = math.radians(self.headings) * (heading / math.pi - 1)
        sense = rng.choice([-1.0, 1.0])
        cuts = np.array([1, 2]) / 3 + rng.uniform(-1, 1, 2) * self.boundary_jitter
        step = self.translate * unit * np.array([math.sin(heading), math.cos(heading)])
        room = np.maximum(0.0, size / 2 - radius * math.exp(abs(growth) / 2) - np.abs(step) / 2)
        middle = size / 2 + rng.uniform(-1, 1, 2) * room

        edges = (0.0, *cuts, 1.0)
        ramps = {
            name.split("-")[0]: _ramp(frames, edges[i], edges[i + 1]) for i, name in enumerate(self.triples[label])
        }
        if self.rotation_senses == 2:
            sense = 1.0 if "rotate-cw" in self.triples[label] else -1.0
        centre = middle + (ramps["translate"] - 0.5)[:, None] * step
        angles = angle + sense * math.radians(self.rotate) * ramps["rotate"]
        radii = radius * np.exp(growth * (ramps["scale"] - 0.5))
        raster.draw(clip, shape, centre, radii, angles, raster.random_colours(rng), skin=skin)
        return clip, {"shape": shape, "grows": bool(growth > 0), "heading": float(heading), "cuts": cuts.tolist()}


@dataclass(frozen=True)
class Order(Suite):
    """Two different events, one after the other; the class is the ordered pair: 12 classes of 4 events.
    Each event is its own time reverse, so the reverse of a clip of class (a, b) is one of class (b, a).
    """

    events: tuple[str, ...] = EVENTS
    hop: float = 20.0  # pixels there and back
    pulse: float = 0.8  # relative growth
    wiggle: float = 110.0  # degrees there and back
    flash: float = 0.9  # relative brightness
    length: float = 0.4  # of an event, relative to the clip
    time_jitter: float = 0.04  # of an event's middle, about 1/4 and 3/4
    radius: tuple[float, float] = (10.0, 13.0)
    background: TextureConfig = TextureConfig(contrast=0.05, grey=True)
    name = "order"

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """The two events of each class in their order."""
        return tuple(itertools.permutations(self.events, 2))

    @property
    def classes(self) -> tuple[str, ...]:
        """The pairs, joined by ``>``."""
        return tuple(">".join(p) for p in self.pairs)

    def pose(self, pair: tuple[str, str], times: np.ndarray, frames: int) -> dict[str, np.ndarray]:
        """Strength 0..1 of every event in every frame, for the pair's events centred at ``times`` (of the clip's
        length). An event is a symmetric bump, so that the pose of the reversed pair at 1 - times is the pose reversed.
        """
        t = np.arange(frames) / max(1, frames - 1)
        bumps = {}
        for name, centre in zip(pair, times, strict=True):
            phase = np.clip((t - centre) / self.length, -0.5, 0.5)
            bumps[name] = 0.5 + 0.5 * np.cos(2 * math.pi * phase)
        return bumps

    @property
    def factors(self) -> tuple[tuple[int, ...], ...]:
        """First and second event."""
        return tuple((self.events.index(a), self.events.index(b)) for a, b in self.pairs)

    def render(self, rng: np.random.Generator, size: int, frames: int, label: int) -> Rendered:
        """As `Suite.render`; attributes: shape and the middles of the two events (of the clip's length)."""
        unit = size / 64.0
        clip = _still(self.background.draw(rng, size, size), frames)
        skin, shape = _skin(rng), raster.SHAPES[int(rng.integers(len(raster.SHAPES)))]
        radius = rng.uniform(*self.radius) * unit
        heading, angle = rng.uniform(0, 2 * math.pi, 2)
        sense = rng.choice([-1.0, 1.0])
        times = np.array([0.25, 0.75]) + rng.uniform(-1, 1, 2) * self.time_jitter
        step = self.hop * unit * np.array([math.sin(heading), math.cos(heading)])
        room = np.maximum(0.0, size / 2 - radius * (1 + self.pulse) - np.abs(step) / 2)
        middle = size / 2 + rng.uniform(-1, 1, 2) * room - step / 2

        bumps = self.pose(self.pairs[label], times, frames)
        rest = np.zeros(frames)
        centre = middle + bumps.get("hop", rest)[:, None] * step
        radii = radius * (1 + self.pulse * bumps.get("pulse", rest))
        angles = angle + sense * math.radians(self.wiggle) * bumps.get("wiggle", rest)
        gain = 1 + self.flash * bumps.get("flash", rest)
        raster.draw(clip, shape, centre, radii, angles, raster.random_colours(rng), skin=skin, gain_F=gain)
        return clip, {"shape": shape, "times": times.tolist()}


@dataclass(frozen=True)
class Objects(Suite):
    """Still images: shape x pattern x colour, one class per combination, on a texture of random hues. A shape comes in
    three of the six colours only, those of the base classes of ``fewshot``: none of its novel appearances is here.
    """

    shapes: tuple[str, ...] = ("disc", "square", "triangle", "cross")
    patterns: tuple[str, ...] = PATTERNS
    colours: tuple[str, ...] = tuple(COLOURS)
    radius: tuple[float, float] = (18.0, 27.0)
    colour_jitter: float = 0.08
    background: TextureConfig = TextureConfig(coarse=24.0, contrast=0.12)
    name = "objects"
    modality = "image"

    @property
    def combinations(self) -> tuple[tuple[str, str, str], ...]:
        """Shape, pattern and colour of each class."""
        own = _part("train", self.name, len(self.shapes), len(self.colours))
        return tuple((self.shapes[i], name, self.colours[j]) for i, j in own for name in self.patterns)

    @property
    def classes(self) -> tuple[str, ...]:
        """Shape, pattern and colour, joined by hyphens."""
        return tuple("-".join(c) for c in self.combinations)

    @property
    def factors(self) -> tuple[tuple[int, ...], ...]:
        """Shape, pattern and colour."""
        kinds = self.shapes, self.patterns, self.colours
        return tuple(tuple(map(tuple.index, kinds, combination)) for combination in self.combinations)

    def render(self, rng: np.random.Generator, size: int, frames: int, label: int) -> Rendered:
        """As `Suite.render`; one frame. Attributes: shape, texture, colour and radius in pixels."""
        unit = size / 64.0
        shape, name, colour = self.combinations[label]
        clip = _still(self.background.draw(rng, size, size), 1)
        radius = rng.uniform(*self.radius, 1) * unit
        centre = size / 2 + rng.uniform(-1, 1, (1, 2)) * np.maximum(0.0, size / 2 - radius)
        angle = rng.uniform(0, 2 * math.pi, 1)
        raster.draw(clip, shape, centre, radius, angle, _jittered(rng, colour, self.colour_jitter), name)
        return clip, {"shape": shape, "texture": name, "colour": colour, "radius": float(radius[0])}


PARTS = {"train": (0, 1, 3), "val": (4,), "test": (2, 5)}  # of the combinations (i, j), by (j - i) mod 6


def _part(split: str, name: str, rows: int, columns: int) -> list[tuple[int, int]]:
    """The combinations (i, j) of a few-shot split: diagonals, so that every i and every j is in every split and no
    combination in two.
    """
    if split not in PARTS:
        raise ValueError(f"{name} has the splits train (base), val and test (novel), not {split!r}")
    return [(i, j) for i in range(rows) for j in range(columns) if (j - i) % 6 in PARTS[split]]


@dataclass(frozen=True)
class FewShot(Suite):
    """Appearance x motion: 36 appearances (6 shapes x 6 colours) x 6 motions = 216 classes. The appearances are divided
    18 / 6 / 12 over train (base), val and test (novel), hence 108 / 36 / 72 classes. No appearance is in two parts, but
    every shape and every colour is in all three: what is novel is how they are combined.
    """

    colours: tuple[str, ...] = tuple(COLOURS)
    motions: tuple[str, ...] = MOTIONS
    travel: float = 20.0  # pixels
    rotate: float = 180.0  # degrees
    grow: float = 2.0  # factor
    radius: tuple[float, float] = (9.0, 12.0)
    colour_jitter: float = 0.08
    background: TextureConfig = TextureConfig(contrast=0.12)
    name = "fewshot"

    @property
    def appearances(self) -> tuple[tuple[str, str], ...]:
        """Shape and colour, shape by shape."""
        return tuple(itertools.product(SHAPES, self.colours))

    @property
    def classes(self) -> tuple[str, ...]:
        """Shape, colour and motion, joined by hyphens."""
        return tuple(f"{shape}-{colour}-{motion}" for shape, colour in self.appearances for motion in self.motions)

    @property
    def factors(self) -> tuple[tuple[int, ...], ...]:
        """Shape, colour and motion."""
        return tuple(itertools.product(*(range(len(f)) for f in (SHAPES, self.colours, self.motions))))

    def split_labels(self, split: str) -> tuple[int, ...]:
        """All motions of the split's own appearances."""
        n, m = len(self.colours), len(self.motions)
        return tuple(
            (i * n + j) * m + motion for i, j in _part(split, self.name, len(SHAPES), n) for motion in range(m)
        )

    def render(self, rng: np.random.Generator, size: int, frames: int, label: int) -> Rendered:
        """As `Suite.render`; attributes: shape, colour, texture and motion."""
        unit = size / 64.0
        (shape, colour), motion = self.appearances[label // len(self.motions)], self.motions[label % len(self.motions)]
        clip = _still(self.background.draw(rng, size, size), frames)
        name = raster.PATTERNS[1 + int(rng.integers(len(raster.PATTERNS) - 1))]
        radius, angle = rng.uniform(*self.radius) * unit, rng.uniform(0, 2 * math.pi)
        spread, sense = rng.uniform(-1, 1, 2), rng.choice([-1.0, 1.0])
        colours = _jittered(rng, colour, self.colour_jitter)

        ramp = _ramp(frames, 0.0, 1.0) - 0.5
        heading = {"right": (0, 1), "down": (1, 0), "left": (0, -1), "up": (-1, 0)}.get(motion, (0, 0))
        step = self.travel * unit * np.array(heading)
        room = np.maximum(0.0, size / 2 - radius * math.sqrt(self.grow) - self.travel * unit / 2)
        centre = size / 2 + spread * room + ramp[:, None] * step
        angles = angle + (sense * math.radians(self.rotate) * ramp if motion == "rotate" else np.zeros(frames))
        radii = radius * (self.grow**ramp if motion == "grow" else np.ones(frames))
        raster.draw(clip, shape, centre, radii, angles, colours, name)
        return clip, {"shape": shape, "colour": colour, "texture": name, "motion": motion}


@dataclass(frozen=True)
class FewMotion(Suite):
    """Motion alone: one appearance in all clips, 6 headings x 6 changes = 36 classes, divided 18 / 6 / 12 over train
    (base), val and test (novel). Every heading and every change is in all three parts; what is novel is how they are
    combined. Background, pattern, size, place and angle at the start are drawn apart from the label.
    """

    shape: str = "cross"
    colour: str = "yellow"
    headings: int = 6  # directions of translation, evenly over the circle
    travel: float = 20.0  # pixels
    turn: float = 120.0  # degrees
    grow: float = 2.0  # factor
    radius: tuple[float, float] = (9.0, 12.0)
    colour_jitter: float = 0.08
    background: TextureConfig = TextureConfig(contrast=0.12)
    name = "fewmotion"

    @property
    def classes(self) -> tuple[str, ...]:
        """Heading in degrees clockwise from the right, and change, joined by a hyphen."""
        degrees = [round(360 * i / self.headings) for i in range(self.headings)]
        return tuple(f"{degree}-{change}" for degree in degrees for change in CHANGES)

    @property
    def factors(self) -> tuple[tuple[int, ...], ...]:
        """Heading and change."""
        return tuple(itertools.product(range(self.headings), range(len(CHANGES))))

    def split_labels(self, split: str) -> tuple[int, ...]:
        """The split's own combinations."""
        return tuple(i * len(CHANGES) + j for i, j in _part(split, self.name, self.headings, len(CHANGES)))

    def render(self, rng: np.random.Generator, size: int, frames: int, label: int) -> Rendered:
        """As `Suite.render`; attributes: texture, heading (degrees) and change."""
        unit = size / 64.0
        heading, change = 360 * (label // len(CHANGES)) / self.headings, CHANGES[label % len(CHANGES)]
        clip = _still(self.background.draw(rng, size, size), frames)
        name = raster.PATTERNS[1 + int(rng.integers(len(raster.PATTERNS) - 1))]
        radius, angle = rng.uniform(*self.radius) * unit, rng.uniform(0, 2 * math.pi)
        spread = rng.uniform(-1, 1, 2)
        colours = _jittered(rng, self.colour, self.colour_jitter)

        ramp = _ramp(frames, 0.0, 1.0) - 0.5
        there_and_back = 0.5 - 0.5 * np.cos(4 * math.pi * (ramp + 0.5))  # twice
        step = self.travel * unit * np.array([math.sin(math.radians(heading)), math.cos(math.radians(heading))])
        room = np.maximum(0.0, size / 2 - radius * math.sqrt(self.grow) - np.abs(step) / 2)
        centre = size / 2 + spread * room + ramp[:, None] * step
        angles = angle + math.radians(self.turn) * {"turn-right": 1, "turn-left": -1}.get(change, 0) * ramp
        power = {"grow": ramp, "shrink": -ramp, "pulse": there_and_back - 0.5}.get(change, np.zeros(frames))
        raster.draw(clip, self.shape, centre, radius * self.grow**power, angles, colours, name)
        return clip, {"texture": name, "heading": heading, "change": change}


for _suite in (Motion8(), Dive(), Order(), Objects(), FewShot(), FewMotion()):
    SUITES.add(_suite.name, _suite)
