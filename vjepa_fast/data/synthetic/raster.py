"""Fast drawing in numpy: band-limited textures, panning windows, antialiased textured shapes.

Coordinates are pixels, (y, x), float32; colours are 0..1. Nothing here knows about classes or labels.
Textures are periodic, so a window can be read from them at any offset and every offset looks alike.
"""

from __future__ import annotations

import numpy as np

SHAPES = ("disc", "square", "triangle", "cross", "ring", "moon")
PATTERNS = ("solid", "stripes", "checker", "dots")


def texture(
    rng: np.random.Generator, side: int, coarse: float, fine: float, contrast: float, grey: bool = False
) -> np.ndarray:
    """Random coloured periodic texture, float32 ``[side, side, 3]`` in 0..1.

    Args:
        rng: draws everything.
        side: pixels of each side.
        coarse: longest wavelength in pixels.
        fine: shortest wavelength in pixels; between the two amplitude goes as the wavelength, as in photographs.
        contrast: standard deviation of each channel about a random mean colour.
        grey: one field for all channels about a mean of 0.5, so that every texture has the same first statistics.
    """
    fy = np.fft.fftfreq(side)[:, None].astype(np.float32)
    fx = np.fft.rfftfreq(side)[None, :].astype(np.float32)
    f = np.sqrt(fy * fy + fx * fx)
    rows, cols = np.nonzero((f >= 1.0 / coarse) & (f <= 1.0 / fine))
    spectrum = np.zeros((1 if grey else 3, side, side // 2 + 1), np.complex64)
    noise = rng.standard_normal((2, 1 if grey else 3, len(rows)), dtype=np.float32)
    spectrum[:, rows, cols] = (noise[0] + 1j * noise[1]) / f[rows, cols]
    field = np.fft.irfft2(spectrum, s=(side, side)).astype(np.float32, copy=False)
    field /= field.std() + 1e-12
    if grey:
        return np.repeat(np.clip(contrast * field.transpose(1, 2, 0) + 0.5, 0.0, 1.0), 3, axis=2)
    mixing = rng.standard_normal((3, 3), dtype=np.float32)  # random hue: how the three fields colour the channels
    mixing /= np.linalg.norm(mixing, axis=1, keepdims=True)
    mean = rng.uniform(0.3, 0.7, 3).astype(np.float32)
    return np.clip(np.tensordot(field, contrast * mixing, axes=(0, 1)) + mean, 0.0, 1.0)


def pan(canvas: np.ndarray, offsets_F2: np.ndarray, size: int) -> np.ndarray:
    """Windows ``[F, size, size, 3]`` of a periodic canvas at sub-pixel offsets (bilinear)."""
    side = canvas.shape[0]
    whole = np.floor(offsets_F2).astype(np.int64)
    part = (offsets_F2 - whole).astype(np.float32)
    span = np.arange(size + 1)
    out = np.empty((len(whole), size, size, canvas.shape[2]), np.float32)
    for f, ((y, x), (wy, wx)) in enumerate(zip(whole, part, strict=True)):
        window = canvas.take((y + span) % side, axis=0).take((x + span) % side, axis=1)
        rows = window[:-1] * (1 - wy) + window[1:] * wy
        np.multiply(rows[:, :-1], 1 - wx, out=out[f])
        out[f] += rows[:, 1:] * wx
    return out


def sample(canvas: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Bilinear samples ``[..., 3]`` of a periodic canvas at any positions."""
    side = canvas.shape[0]
    y0, x0 = np.floor(y), np.floor(x)
    wy, wx = (y - y0)[..., None], (x - x0)[..., None]
    y0, x0 = y0.astype(np.int64) % side, x0.astype(np.int64) % side
    y1, x1 = (y0 + 1) % side, (x0 + 1) % side
    flat = canvas.reshape(-1, canvas.shape[2])
    top = flat.take(y0 * side + x0, axis=0) * (1 - wx) + flat.take(y0 * side + x1, axis=0) * wx
    bottom = flat.take(y1 * side + x0, axis=0) * (1 - wx) + flat.take(y1 * side + x1, axis=0) * wx
    return top * (1 - wy) + bottom * wy


def distance(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Signed distance (negative inside, exact enough for antialiasing) to a shape within the unit disc."""
    if shape == "disc":
        return np.sqrt(u * u + v * v) - 0.85
    if shape == "square":
        return np.maximum(np.abs(u), np.abs(v)) - 0.72
    if shape == "triangle":
        return np.maximum(v, np.abs(u) * 0.8660254 - v * 0.5) - 0.48
    if shape == "cross":
        a, b = np.abs(u), np.abs(v)
        return np.minimum(np.maximum(a - 0.3, b - 0.9), np.maximum(a - 0.9, b - 0.3))
    if shape == "ring":
        return np.abs(np.sqrt(u * u + v * v) - 0.65) - 0.24
    if shape == "moon":
        return np.maximum(np.sqrt(u * u + v * v) - 0.9, 0.7 - np.sqrt((u - 0.55) ** 2 + v * v))
    raise ValueError(f"unknown shape {shape!r}, one of {', '.join(SHAPES)}")


def pattern(name: str, u: np.ndarray, v: np.ndarray, radius: np.ndarray) -> np.ndarray | None:
    """Share 0..1 of the second colour at (u, v); ``radius`` in pixels sets the width of the soft edges."""
    if name == "solid":
        return None
    if name == "stripes":
        wave, wavelength = np.sin(9.0 * u), 0.70
    elif name == "checker":
        wave, wavelength = np.sin(5.5 * u) * np.sin(5.5 * v), 1.14
    elif name == "dots":
        wave, wavelength = np.cos(9.0 * u) + np.cos(9.0 * v) - 0.9, 0.70
    else:
        raise ValueError(f"unknown pattern {name!r}, one of {', '.join(PATTERNS)}")
    return np.clip(0.5 + wave * (radius * wavelength / 6.2832), 0.0, 1.0)


def draw(
    frames: np.ndarray,
    shape: str,
    centre_F2: np.ndarray,
    radius_F: np.ndarray,
    angle_F: np.ndarray,
    colours: tuple[np.ndarray, np.ndarray],
    pattern_name: str | None = None,
    skin: np.ndarray | None = None,
    gain_F: np.ndarray | None = None,
) -> None:
    """Draw one moving object into ``frames`` ``[F, size, size, 3]`` in place.

    Args:
        frames: float32 in 0..1; changed in place.
        shape: one of ``SHAPES``.
        centre_F2: (y, x) in every frame, pixels.
        radius_F: in every frame, pixels.
        angle_F: in every frame, radians.
        colours: two colours ``[3]`` that the pattern alternates.
        pattern_name: one of ``PATTERNS``; None: solid.
        skin: a texture fixed to the object instead, 16 of its pixels to one radius.
        gain_F: brightness of the object in every frame.
    """
    num, size = frames.shape[0], frames.shape[1]
    reach = radius_F[:, None] + 1.5
    low = np.clip(np.floor((centre_F2 - reach).min(0)), 0, size).astype(int)
    high = np.clip(np.ceil((centre_F2 + reach).max(0)) + 1, 0, size).astype(int)
    if (high <= low).any():
        return
    box = frames[:, low[0] : high[0], low[1] : high[1]]
    radius = radius_F.astype(np.float32)[:, None, None]
    centre, angle = centre_F2.astype(np.float32), angle_F.astype(np.float32)
    dy = (np.arange(low[0], high[0], dtype=np.float32)[None, :] - centre[:, :1])[:, :, None] / radius
    dx = (np.arange(low[1], high[1], dtype=np.float32)[None, :] - centre[:, 1:])[:, None, :] / radius
    cos, sin = np.cos(angle)[:, None, None], np.sin(angle)[:, None, None]
    u, v = cos * dx + sin * dy, cos * dy - sin * dx
    cover = np.clip(0.5 - distance(shape, u, v) * radius, 0.0, 1.0)
    f, y, x = np.nonzero(cover)
    u, v, share = u[f, y, x], v[f, y, x], cover[f, y, x][:, None]
    first, second = (np.asarray(c, np.float32) for c in colours)
    if skin is not None:
        paint = sample(skin, v * 16.0, u * 16.0)
    else:
        mix = pattern(pattern_name or "solid", u, v, radius_F.astype(np.float32)[f])
        paint = np.broadcast_to(first, (len(u), 3)) if mix is None else first + mix[:, None] * (second - first)
    if gain_F is not None and num:
        paint = paint * gain_F.astype(np.float32)[f][:, None]
    under = box[f, y, x]
    box[f, y, x] = under + share * (paint - under)


def random_colours(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Two colours that stand out from one another."""
    first = rng.uniform(0.0, 1.0, 3)
    second = np.where(first > 0.5, first - rng.uniform(0.35, 0.5, 3), first + rng.uniform(0.35, 0.5, 3))
    return first.astype(np.float32), second.astype(np.float32)


def to_uint8(frames: np.ndarray) -> np.ndarray:
    """Frames in 0..1 (clipped to it) as uint8, rounded."""
    return (np.clip(frames, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)
