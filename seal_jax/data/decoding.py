"""Decode an image file of any kind into 8-bit pixels of a wanted number of channels and size."""

import io
from typing import Any

import numpy as np

from seal_jax.errors import UsageError

# Pillow's modes by number of channels.
MODES = {1: "L", 3: "RGB", 4: "RGBA"}


class CorruptImageError(ValueError):
    """Bytes that are no image, are cut short or damaged, or cannot be shown in 8 bits; says what is wrong."""


def decode(
    encoded: bytes,
    channels: int,
    size: tuple[int, int] | None = None,
    crop: int | None = None,
) -> np.ndarray:
    """Decode an image file as a viewer would show it.

    ==========================  ==============================================================================
    stored as                   decoded as
    ==========================  ==============================================================================
    16 bits a channel           the upper 8 bits
    1 bit, palette              its colours
    CMYK, YCCK                  red, green and blue without a colour profile; of a JPEG, inverted where Adobe's
                                marker says so
    with transparency           composited over white, unless 4 channels are wanted
    colour, 1 channel wanted    luma of ITU-R 601-2
    grey, 3 channels wanted     repeated
    with an EXIF orientation    turned upright
    several frames or pages     the first
    ==========================  ==============================================================================

    It needs no state, so it can be sent to worker processes.

    Args:
      encoded: the file's bytes, in any format that Pillow reads.
      channels: 1 (grey), 3 (red, green, blue) or 4 (with alpha).
      size: ``(height, width)`` to resize to, bilinear and antialiased; None keeps the stored size.
      crop: side of the square to cut from the middle after that; None keeps all.

    Returns:
      uint8 ``[height, width, channels]``.

    Raises:
      CorruptImageError: where the bytes cannot be decoded; the message is the reason, without a file's name.
      UsageError: where the image is smaller than ``crop``.

    >>> from PIL import Image
    >>> file = io.BytesIO()
    >>> Image.new("RGBA", (6, 4), (255, 0, 0, 0)).save(file, "PNG")
    >>> decode(file.getvalue(), 3, size=(2, 3)).shape, decode(file.getvalue(), 1)[0, 0]
    ((2, 3, 3), array([255], dtype=uint8))
    """
    # Here and not above: whoever only lists data sets does not load Pillow.
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(encoded)) as stored:
            image = _converted(stored, MODES[channels])
    except UnidentifiedImageError as error:
        raise CorruptImageError("it is in no image format that Pillow reads") from error
    # Not damage of the file: another machine may decode it.
    except MemoryError:
        raise
    # Pillow's decoders report damage by OSError, SyntaxError, ValueError, struct.error and others.
    except Exception as error:
        raise CorruptImageError(" ".join(str(error).split()) or type(error).__name__) from error
    # Pillow's sizes are (width, height).
    if size is not None and image.size != size[::-1]:
        image = image.resize(size[::-1], Image.Resampling.BILINEAR)
    if crop is not None:
        width, height = image.size
        if crop > min(width, height):
            raise UsageError(
                f"crop={crop} is larger than an image ({height}x{width}): "
                "set data.image_size, or lower it"
            )
        # Half a pixel is rounded to the even side, as torchvision does.
        left, top = round((width - crop) / 2), round((height - crop) / 2)
        image = image.crop((left, top, left + crop, top + crop))
    pixels = np.asarray(image)
    return pixels.reshape(*pixels.shape[:2], channels)


def _converted(image: Any, mode: str) -> Any:
    """Load an opened image; return it turned upright and converted to ``mode``."""
    from PIL import Image, ImageChops, ImageOps

    # Opening reads the header only; damage further on shows here.
    image.load()
    form, marked = image.format, "adobe" in image.info
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except MemoryError:
        raise
    except Exception:
        pass  # damaged metadata does not make pixels unreadable
    if image.mode.startswith("I;16") or (image.mode == "I" and form in ("PNG", "PPM")):
        # Pillow's conversion would clip at 255. The upper 8 bits are what it keeps of 16-bit colour.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        kind = "floats" if image.mode == "F" else "32-bit integers"
        raise ValueError(f"its pixels are {kind} of no known range: convert it to 8 or 16 bits")
    # Pillow takes every CMYK JPEG for Adobe's, which are inverted; without the marker, 0 is no ink.
    elif image.mode == "CMYK" and form in ("JPEG", "MPO") and not marked:
        image = ImageChops.invert(image)
    if image.has_transparency_data and mode != "RGBA":
        # Without alpha the colours below would appear that nobody is meant to see.
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == mode else image.convert(mode)
