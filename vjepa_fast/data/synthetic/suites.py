"""The suites' parameters: one frozen dataclass each. Lengths are pixels of a 64-pixel frame and scale with the frame.

Every suite names its classes, and for every split the labels that occur in it. Appearance is drawn apart from the
label wherever the label is a motion, and motion wherever it is an appearance.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

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


@dataclass(frozen=True)
class TextureConfig:
    """Band-limited background: longest and shortest wavelength, and contrast (standard deviation, 0..1)."""

    coarse: float = 32.0
    fine: float = 8.0
    contrast: float = 0.18
    grey: bool = False  # one field for all three channels about mid-grey: every texture has the same mean and contrast


class Suite:
    """What every suite offers beside its parameters."""

    name: str
    modality = "video"

    @property
    def classes(self) -> tuple[str, ...]:
        raise NotImplementedError

    def split_labels(self, split: str) -> tuple[int, ...]:
        """Labels that occur in a split: all of them, unless classes are split."""
        return tuple(range(len(self.classes)))


@dataclass(frozen=True)
class Motion8(Suite):
    """Eight directions: a whole textured scene pans in the direction of the label, as a random-dot kinematogram does.

    The texture is new in every clip and grey, of one mean and one contrast: what tells clips apart is the motion, not a
    palette. ``sprites`` shapes in random colours can ride on it.
    """

    speed: tuple[float, float] = (1.5, 3.5)  # pixels per frame
    sprites: int = 0  # in the whole scene, of which about a quarter is seen at a time
    sprite_radius: tuple[float, float] = (6.0, 12.0)
    brightness_jitter: float = 0.0  # standard deviation of a gain per frame
    background: TextureConfig = TextureConfig(coarse=24.0, fine=8.0, contrast=0.2, grey=True)
    name = "motion8"

    @property
    def classes(self) -> tuple[str, ...]:
        return DIRECTIONS


@dataclass(frozen=True)
class Dive(Suite):
    """Ordered triples of primitives: each of translate, rotate, scale once, in one of 6 orders, and for
    ``rotation_senses = 2`` turning clockwise or anticlockwise: 12 classes. Every class holds the same
    primitives with the same amounts, so that no single frame tells it. Directions of translation and
    whether the object grows or shrinks are drawn apart from the label.
    """

    rotation_senses: int = 2  # 1: the sense is drawn apart from the label; 6 classes
    translate: float = 18.0  # pixels
    rotate: float = 100.0  # degrees
    scale: float = 1.7  # factor, or its inverse
    radius: tuple[float, float] = (11.0, 15.0)  # geometric mean of the radii before and after scaling
    boundary_jitter: float = 0.04  # of the clip's length, about 1/3 and 2/3
    background: TextureConfig = TextureConfig()
    name = "dive"

    @property
    def triples(self) -> tuple[tuple[str, ...], ...]:
        turns = ("rotate",) if self.rotation_senses == 1 else ("rotate-cw", "rotate-ccw")
        return tuple(t for turn in turns for t in itertools.permutations(("translate", turn, "scale")))

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(">".join(t) for t in self.triples)


@dataclass(frozen=True)
class Order(Suite):
    """Two different events, one after the other; the class is the ordered pair: 12 classes of 4 events.
    Each event is its own time reverse, so the reverse of a clip of class (a, b) is one of class (b, a).
    """

    events: tuple[str, ...] = EVENTS
    hop: float = 14.0  # pixels there and back
    pulse: float = 0.6  # relative growth
    wiggle: float = 70.0  # degrees there and back
    flash: float = 0.9  # relative brightness
    length: float = 0.4  # of an event, relative to the clip
    time_jitter: float = 0.04  # of an event's middle, about 1/4 and 3/4
    radius: tuple[float, float] = (10.0, 15.0)
    background: TextureConfig = TextureConfig()
    name = "order"

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        return tuple(itertools.permutations(self.events, 2))

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(">".join(p) for p in self.pairs)


@dataclass(frozen=True)
class Objects(Suite):
    """Still images: shape x pattern x colour, one class per combination, on a grey texture."""

    shapes: tuple[str, ...] = ("disc", "square", "triangle", "cross")
    patterns: tuple[str, ...] = PATTERNS
    colours: tuple[str, ...] = ("red", "green", "blue")
    radius: tuple[float, float] = (18.0, 27.0)
    colour_jitter: float = 0.08
    background: TextureConfig = TextureConfig(coarse=24.0, contrast=0.12, grey=True)
    name = "objects"
    modality = "image"

    @property
    def combinations(self) -> tuple[tuple[str, str, str], ...]:
        return tuple(itertools.product(self.shapes, self.patterns, self.colours))

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple("-".join(c) for c in self.combinations)


@dataclass(frozen=True)
class FewShot(Suite):
    """Appearance x motion: 12 appearances (6 shapes, 2 colours each) x 6 motions = 72 classes. The appearances are
    divided 6 / 2 / 4 over train (base), val and test (novel), hence 36 / 12 / 24 classes and no appearance in two.
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
        """Shape and colour; the order mixes shapes and colours over the three parts."""
        n = len(self.colours)
        return tuple(
            (shape, self.colours[(i + turn * (n // 2)) % n]) for turn in range(2) for i, shape in enumerate(SHAPES)
        )

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(f"{shape}-{colour}-{motion}" for shape, colour in self.appearances for motion in self.motions)

    def split_labels(self, split: str) -> tuple[int, ...]:
        part = {"train": (0, 2, 4, 7, 9, 11), "val": (1, 8), "test": (3, 5, 6, 10)}.get(split)
        if part is None:
            raise ValueError(f"fewshot has the splits train (base), val and test (novel), not {split!r}")
        m = len(self.motions)
        return tuple(a * m + i for a in part for i in range(m))


SUITES: dict[str, Suite] = {s.name: s for s in (Motion8(), Dive(), Order(), Objects(), FewShot())}
