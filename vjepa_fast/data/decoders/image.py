"""Reading images with Pillow."""

from __future__ import annotations

import os

import numpy as np

from vjepa_fast.data.media import VIDEO_SUFFIXES, check_file, one_line, suffix_of
from vjepa_fast.errors import DataError


def read_image(path: str | os.PathLike[str]) -> np.ndarray:
    """Read an image as uint8 ``[H, W, 3]``, RGB. DataError if it is missing, damaged or no image."""
    from PIL import Image, UnidentifiedImageError

    path = os.fspath(path)
    check_file(path)
    try:
        with Image.open(path) as image:
            return np.array(image.convert("RGB"))
    except UnidentifiedImageError:
        kind = "is a video, an image is meant here" if suffix_of(path) in VIDEO_SUFFIXES else "is not a readable image"
        raise DataError(f"{path}: {kind}") from None
    except Exception as error:  # Pillow's decoders raise all sorts on damaged data
        raise DataError(f"{path}: damaged image ({one_line(error)})") from None
