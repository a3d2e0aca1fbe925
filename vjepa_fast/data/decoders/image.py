"""Reading images with Pillow."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

from vjepa_fast.data.media import VIDEO_SUFFIXES, ReadOptions, check_file, one_line, suffix_of
from vjepa_fast.data.members import open_file
from vjepa_fast.errors import DataError

if TYPE_CHECKING:
    from typing import IO

    from PIL.Image import Image

_FORMATS = ("JPEG", "PNG", "BMP", "DIB", "WEBP", "TIFF", "PPM")


def open_image(source: str | IO[bytes]) -> Image:
    """Open an image of one of the kinds that the suffixes mean; errors are Pillow's.

    Pillow alone goes by the content and takes any other kind too: of one it runs Ghostscript.
    """
    from PIL import Image

    Image.init()
    return Image.open(source, formats=[name for name in _FORMATS if name in Image.OPEN])


def read_image(path: str | os.PathLike[str], options: ReadOptions | None = None) -> np.ndarray:
    """Read an image as people see it, uint8 ``[H, W, 3]``, RGB.

    Turned as its EXIF orientation says; more than 8 bits are scaled to 8; what is transparent shows white.

    Raises:
        DataError: it is missing, damaged or no image, or has more than ``options.max_pixels``.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    path, options = os.fspath(path), options or ReadOptions()
    check_file(path)
    try:
        with open_file(path) as file, open_image(file) as image:
            options.check_size(path, *image.size)
            return _rgb(ImageOps.exif_transpose(image))
    except DataError:
        raise
    except UnidentifiedImageError:
        kind = "is a video, an image is meant here" if suffix_of(path) in VIDEO_SUFFIXES else "is not a readable image"
        raise DataError(f"{path}: {kind}") from None
    except Image.DecompressionBombError as error:
        raise DataError(f"{path}: more pixels than Pillow decodes ({one_line(error)}); scale it down") from None
    except Exception as error:  # Pillow's decoders raise all sorts on damaged data
        raise DataError(f"{path}: damaged image ({one_line(error)})") from None


def _rgb(image: Image) -> np.ndarray:
    from PIL import Image as images

    if image.mode.startswith("I") or image.mode == "F":
        return np.repeat(_eight_bits(np.asarray(image))[..., None], 3, axis=2)
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        image = images.alpha_composite(images.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))


def _eight_bits(grey: np.ndarray) -> np.ndarray:
    """Levels of 16 or 32 bits, or fractions, as uint8: full scale is 1 of fractions, else 255 or 65535."""
    top = float(grey.max(initial=0))
    scale = 255.0 if grey.dtype.kind == "f" and top <= 1 else 1.0 if grey.dtype != np.uint16 and top <= 255 else 1 / 257
    return np.rint(np.clip(np.nan_to_num(grey * scale), 0, 255)).astype(np.uint8)
