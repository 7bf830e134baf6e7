"""Images as they lie in real folders, against the pixels they were made from."""

from __future__ import annotations

import io
import pickle
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from seal_jax.data.decoding import CorruptImageError, decode
from seal_jax.errors import UsageError

RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)
GREYS = RNG.integers(0, 256, (6, 9), dtype=np.uint8)
ALPHA = RNG.integers(0, 256, (6, 9), dtype=np.uint8)
DEEP = RNG.integers(0, 2**16, (6, 9), dtype=np.uint16)


def encode(image, form="PNG", **options):
    file = io.BytesIO()
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    image.save(file, form, **options)
    return file.getvalue()


def repeated(grey):
    return np.repeat(grey[..., None], 3, axis=-1)


def png(bits, colour, rows):
    """A PNG by hand: Pillow writes neither 16-bit colour nor colour keys of it."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", rows.shape[1], rows.shape[0], bits, colour, 0, 0, 0)
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in rows)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def over_white(colours, alpha):
    share = alpha[..., None].astype(float) / 255
    return colours * share + 255 * (1 - share)


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000"])
def test_plain_images_are_their_pixels(form):
    lossless = {"lossless": True} if form == "WEBP" else {}
    stored = encode(COLOURS, form, **lossless)
    np.testing.assert_array_equal(decode(stored, 3), COLOURS)
    luma = COLOURS @ np.array([0.299, 0.587, 0.114])
    np.testing.assert_allclose(decode(stored, 1)[..., 0], luma, atol=0.51)
    if form != "WEBP":  # which has no grey
        np.testing.assert_array_equal(decode(encode(GREYS, form), 1), GREYS[..., None])
        np.testing.assert_array_equal(decode(encode(GREYS, form), 3), repeated(GREYS))


@pytest.mark.parametrize(
    "stored",
    [
        encode(DEEP),
        encode(DEEP, "TIFF"),
        encode(DEEP.astype(">u2"), "TIFF"),
        encode(DEEP, "PPM"),
        encode(DEEP, "JPEG2000"),
    ],
    ids=["PNG", "TIFF", "TIFF of Motorola", "PGM", "JPEG2000"],
)
def test_16_bits_are_scaled(stored):
    np.testing.assert_array_equal(decode(stored, 1)[..., 0], DEEP // 256)
    np.testing.assert_array_equal(decode(stored, 3), repeated(DEEP // 256))


def test_16_bits_of_colour_are_scaled_alike():
    deep = RNG.integers(0, 2**16, (6, 9, 3), dtype=np.uint16)
    np.testing.assert_array_equal(decode(png(16, 2, deep), 3), deep // 256)
    with_alpha = np.stack([DEEP, np.full_like(DEEP, 2**16 - 1)], axis=-1)
    np.testing.assert_array_equal(decode(png(16, 4, with_alpha), 1)[..., 0], DEEP // 256)
    # Of 10 bits, as cameras write them, the brightest is white, too.
    ten = b"P5 2 1 1023\n" + struct.pack(">2H", 1023, 512)
    np.testing.assert_array_equal(decode(ten, 1).ravel(), [255, 128])


def test_one_bit_and_palettes():
    bits = GREYS > 127
    for form in ("PNG", "TIFF"):
        stored = encode(Image.fromarray(bits), form)
        np.testing.assert_array_equal(decode(stored, 3), repeated(bits.astype(np.uint8) * 255))
    indexed = Image.fromarray(GREYS % 4, "P")
    palette = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 8, 7]], np.uint8)
    indexed.putpalette(palette.tobytes())
    expected = palette[GREYS % 4]
    for form in ("PNG", "GIF", "TIFF", "BMP"):
        np.testing.assert_array_equal(decode(encode(indexed, form), 3), expected)
    # Index 2 is transparent: white, whatever its colour.
    expected = np.where(GREYS[..., None] % 4 == 2, 255, expected)
    for form in ("PNG", "GIF"):
        np.testing.assert_array_equal(decode(encode(indexed, form, transparency=2), 3), expected)
    shares = encode(indexed, transparency=bytes([255, 0, 128, 255]))
    alpha = np.array([255, 0, 128, 255])[GREYS % 4]
    np.testing.assert_allclose(decode(shares, 3), over_white(palette[GREYS % 4], alpha), atol=1)


def test_transparency_is_composited_over_white():
    rgba = np.concatenate([COLOURS, ALPHA[..., None]], axis=-1)
    for form, options in (("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True, "exact": True})):
        stored = encode(rgba, form, **options)
        np.testing.assert_allclose(decode(stored, 3), over_white(COLOURS, ALPHA), atol=1)
        np.testing.assert_array_equal(decode(stored, 4), rgba)
    grey = np.stack([GREYS, ALPHA], axis=-1)
    expected = over_white(GREYS[..., None], ALPHA)
    np.testing.assert_allclose(decode(encode(Image.fromarray(grey, "LA")), 1), expected, atol=1)
    # Opaque images are their pixels, whatever channels they have.
    rgba[..., 3] = 255
    np.testing.assert_array_equal(decode(encode(rgba), 3), COLOURS)
    # A colour key instead of a channel: pixels of this one colour.
    keyed = encode(COLOURS, transparency=tuple(COLOURS[2, 3].tolist()))
    expected = COLOURS.copy()
    expected[2, 3] = 255
    np.testing.assert_array_equal(decode(keyed, 3), expected)


def test_ink_becomes_light():
    """Adobe's JPEGs store the inverse; files without its marker, and TIFF, do not."""
    cyan, magenta, yellow, black = ink = (200, 30, 0, 20)
    expected = [(255 - part) * (255 - black) / 255 for part in (cyan, magenta, yellow)]
    image = Image.new("CMYK", (16, 16), ink)
    exact = {"quality": 100, "subsampling": 0}
    adobe = encode(image, "JPEG", **exact)
    for stored in (adobe, encode(image, "TIFF"), encode(image, "TIFF", compression="jpeg")):
        np.testing.assert_allclose(decode(stored, 3)[5, 5], expected, atol=3)

    marker = adobe.index(b"\xff\xee")
    length = 2 + int.from_bytes(adobe[marker + 2 : marker + 4], "big")
    # What Pillow writes inverted, for Adobe, is thus stored as it is.
    plain = encode(Image.new("CMYK", (16, 16), tuple(255 - part for part in ink)), "JPEG", **exact)
    plain = plain[:marker] + plain[marker + length :]
    np.testing.assert_allclose(decode(plain, 3)[5, 5], expected, atol=3)

    # YCCK: the inks, inverted, as luma and chroma (JFIF). The marker's last byte says so.
    luma = 0.299 * cyan + 0.587 * magenta + 0.114 * yellow
    chroma = (128 + (yellow - luma) * 0.564, 128 + (cyan - luma) * 0.713)
    stored = (*(round(255 - part) for part in (luma, *chroma)), black)
    ycck = bytearray(encode(Image.new("CMYK", (16, 16), stored), "JPEG", **exact))
    assert ycck[marker + length - 1] == 0
    ycck[marker + length - 1] = 2
    np.testing.assert_allclose(decode(bytes(ycck), 3)[5, 5], expected, atol=4)


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, lambda pixels: pixels),
        (2, lambda pixels: pixels[:, ::-1]),
        (3, lambda pixels: pixels[::-1, ::-1]),
        (4, lambda pixels: pixels[::-1]),
        (5, lambda pixels: pixels.swapaxes(0, 1)),
        (6, lambda pixels: np.rot90(pixels, -1)),
        (7, lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1)),
        (8, lambda pixels: np.rot90(pixels)),
    ],
)
def test_exif_orientation(orientation, upright):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for form, options in (("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True})):
        stored = encode(COLOURS, form, exif=exif, **options)
        np.testing.assert_array_equal(decode(stored, 3), upright(COLOURS))
    np.testing.assert_array_equal(decode(encode(DEEP, exif=exif), 1)[..., 0], upright(DEEP // 256))
    jpeg = encode(COLOURS, "JPEG", exif=exif)
    as_stored = np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"))
    np.testing.assert_array_equal(decode(jpeg, 3), upright(as_stored))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_metadata_leaves_the_pixels():
    for exif in (b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0nonsense", b"Exif\0\0"):
        jpeg = encode(COLOURS, "JPEG", exif=exif)
        expected = np.asarray(Image.open(io.BytesIO(jpeg)))
        np.testing.assert_array_equal(decode(jpeg, 3), expected)


def test_the_first_frame_counts():
    frames = [Image.fromarray(repeated(np.full((6, 9), value, np.uint8))) for value in (40, 200)]
    for form in ("GIF", "TIFF", "PNG", "WEBP"):
        options = {"lossless": True} if form == "WEBP" else {}
        stored = encode(frames[0], form, save_all=True, append_images=frames[1:], **options)
        np.testing.assert_array_equal(decode(stored, 3), np.full((6, 9, 3), 40))


def test_size_and_crop():
    """As they were for plain images, before other kinds were decoded: Pillow's, pixel by pixel."""
    pixels = RNG.integers(0, 256, (40, 30, 3), dtype=np.uint8)
    for options in ({}, {"quality": 90}):
        stored = encode(pixels, "JPEG" if options else "PNG", **options)
        image = Image.open(io.BytesIO(stored))
        np.testing.assert_array_equal(decode(stored, 3), np.asarray(image))
        small = image.resize((15, 17), Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(decode(stored, 3, size=(17, 15)), np.asarray(small))
        middle = np.asarray(small)[4:12, 4:12]  # 4.5 pixels, to the even; 3.5 too
        np.testing.assert_array_equal(decode(stored, 3, (17, 15), crop=8), middle)
        grey = np.asarray(image.convert("L").resize((15, 17), Image.Resampling.BILINEAR))
        np.testing.assert_array_equal(decode(stored, 1, size=(17, 15))[..., 0], grey)
    with pytest.raises(UsageError, match=r"crop=31 is larger than an image .40x30.: set data"):
        decode(encode(pixels), 3, crop=31)


def test_worker_processes_can_have_it():
    again = pickle.loads(pickle.dumps(decode))
    np.testing.assert_array_equal(again(encode(COLOURS), 3), COLOURS)
    error = pickle.loads(pickle.dumps(CorruptImageError("it is cut")))
    assert isinstance(error, CorruptImageError)
    assert str(error) == "it is cut"


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (b"", "in no image format"),
        (b"<html>not found</html>", "in no image format"),
        (encode(np.zeros((300, 300, 3), np.uint8) + COLOURS[0, 0], "JPEG")[:700], "truncated"),
        (encode(RNG.integers(0, 256, (99, 99), dtype=np.uint8))[:5_000], "truncated"),
        (encode(GREYS.astype(np.int32), "TIFF"), "32-bit integers .* convert it to 8 or 16"),
        (encode(GREYS.astype(np.float32), "TIFF"), "floats .* convert it to 8 or 16"),
    ],
    ids=["empty", "page", "jpeg", "png", "integers", "floats"],
)
def test_what_is_no_image_says_why(stored, message):
    with pytest.raises(CorruptImageError, match=message) as caught:
        decode(stored, 3)
    assert "\n" not in str(caught.value)
    assert not isinstance(caught.value, UsageError)  # `data.corrupt` tells the two apart


def test_decompression_bombs(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(CorruptImageError, match=r"\(54 pixels\) exceeds limit of 40 pixels"):
        decode(encode(COLOURS), 3)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP"])
@pytest.mark.filterwarnings("ignore")  # Pillow's, of the damage
def test_damage_is_one_kind_of_error(form):
    """Whatever bytes change: an image, or the one error that callers expect."""
    exif = {} if form in ("GIF", "BMP") else {"exif": b"Exif\0\0II*\0\x08\0\0\0\0\0"}
    whole = encode(COLOURS, form, **exif)
    random, failures = np.random.default_rng(1), 0
    for trial in range(150):
        damaged = bytearray(whole)
        for place in random.integers(0, len(whole), 1 + trial % 5):
            damaged[place] = random.integers(0, 256)
        if trial % 3 == 0:
            damaged = damaged[: random.integers(0, len(whole))]
        try:
            assert decode(bytes(damaged), 3, size=(4, 4)).shape == (4, 4, 3)
        except CorruptImageError:
            failures += 1
    assert failures > 10
