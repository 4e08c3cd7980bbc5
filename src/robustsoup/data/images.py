"""Decode image files to pixels of one size, as torchvision's ImageFolder reads them."""

import contextlib
import io
import sys
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, BinaryIO, TypeGuard

import numpy
import torch

from robustsoup.data.tensors import DARKEST
from robustsoup.errors import DataError
from robustsoup.files import open_regular

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_SUFFIXES = (
    ".bmp",
    ".jpeg",
    ".jpg",
    ".pgm",
    ".png",
    ".ppm",
    ".tif",
    ".tiff",
    ".webp",
)
"""The endings that torchvision's ImageFolder reads."""

IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""What files hold, whatever their ending. Pillow starts another program for some other formats:
for EPS it runs Ghostscript, so that an image could be a program."""

DEFAULT_IMAGE_SIZE = 32
MAX_IMAGE_BYTES = 2**28
"""Largest image file that is read from a shard or a data set of the Hub, in bytes."""

LARGEST_RATIO = 16
"""An image that is longer than this, as a multiple of its shorter side, is cropped before it is
resized, because memory grows with the ratio."""
_ORIENTATION = 0x0112
"""The EXIF tag of the orientation."""
_GREY_MODES = ("1", "L", "LA", "La", "I")
_DEEP_MODES = ("I", "F")
"""Modes of 32 bits; 16 bits of PNG and PPM files are among them in older versions of Pillow."""


@dataclass
class Decoder:
    """Decodes images to uint8 (channels, size, size).

    The shorter side is resized (bilinear, antialiased), then the centre is cropped. Of an image
    longer than LARGEST_RATIO, only the centre is resized. Grey pixels of 16 bits are scaled to 8;
    Pillow itself scales those of colour images.

    Attributes:
        size: Pixels a side.
        channels: 1 or 3; None until `count_channels` decides.
        scaled: Number of images of 16 bits that were decoded so far.
        brightest: Largest pixel of these images, before it was scaled.
    """

    size: int
    channels: int | None = None
    scaled: int = 0
    brightest: int = 0

    def count_channels(self, files: Iterable[str]) -> int:
        """Return the channels: 1 if every file holds a grey image, else 3, unless they are set."""
        if self.channels is None:
            self.channels = 1 if all(_is_grey(file) for file in files) else 3
        return self.channels

    def read(self, file: str | BinaryIO, place: str) -> torch.Tensor:
        """Decode an image file, which may be open.

        Raises:
            DataError: The file cannot be read; the error names the `place`.
        """
        pillow = import_pillow(place)
        with _refuse_broken_images(place):
            source = open_regular(file) if isinstance(file, str) else file
            with source, pillow.open(source, formats=IMAGE_FORMATS) as image:
                return self._resize(image, place)

    def convert(self, image: "Image", place: str) -> torch.Tensor:
        """Return the pixels of an image of Pillow, as `read` does."""
        with _refuse_broken_images(place):
            return self._resize(image, place)

    def _resize(self, image: "Image", place: str) -> torch.Tensor:
        from PIL.Image import Resampling

        image = _crop_long(self._to_8_bits(image, place))
        image = image.convert("L" if self.channels == 1 else "RGB")
        width, height = image.size
        scale = self.size / min(width, height)
        width = max(self.size, round(width * scale))
        height = max(self.size, round(height * scale))
        image = image.resize((width, height), Resampling.BILINEAR)
        left, top = (width - self.size) // 2, (height - self.size) // 2
        image = image.crop((left, top, left + self.size, top + self.size))
        pixels = torch.from_numpy(numpy.array(image))
        return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()

    def _to_8_bits(self, image: "Image", place: str) -> "Image":
        """Scale 16 bits to 8, which Pillow's `convert` clips; refuse pixels of 32 bits."""
        from PIL.Image import fromarray

        if image.mode not in _DEEP_MODES and not image.mode.startswith("I;16"):
            return image
        pixels = numpy.array(image)
        if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM", None)):
            raise DataError(
                f"{place}: got pixels of 32 bits from {pixels.min():g} to {pixels.max():g}, "
                "expected 8 or 16 bits; convert the image"
            )
        if pixels.min() < 0 or pixels.max() > 65535:
            raise DataError(
                f"{place}: got pixels from {pixels.min()} to {pixels.max()}, expected 0 to 65535; "
                "convert the image to 8 bits"
            )
        self.scaled += 1
        self.brightest = max(self.brightest, int(pixels.max()))
        return fromarray(((pixels.astype(numpy.uint32) + 128) // 257).astype(numpy.uint8))


def _crop_long(image: "Image") -> "Image":
    """Return the centre of an image that exceeds LARGEST_RATIO, and other images unchanged.

    The result is still longer than a square by far, so that the filter of the resizing finds every
    pixel around the centre.
    """
    shorter, longer = sorted(image.size)
    longest = shorter * LARGEST_RATIO
    if longer <= longest:
        return image
    before = (longer - longest) // 2
    if image.width == shorter:
        return image.crop((0, before, shorter, before + longest))
    return image.crop((before, 0, before + longest, shorter))


_SENSOR_DEPTHS = (8, 10, 12, 14)
"""Bits of pixels that are stored in 16."""


def doubt_depth(scaled: int, brightest: int) -> tuple[str, ...]:
    """Return a note if images of 16 bits seem to hold fewer bits, which makes them almost black.

    Args:
        scaled: Number of images of 16 bits that were scaled to 8.
        brightest: Their largest pixel, before it was scaled.
    """
    pixel = (brightest + 128) // 257
    if not scaled or not brightest or pixel > DARKEST:
        return ()
    bits = next(depth for depth in _SENSOR_DEPTHS if brightest < 2**depth)
    note = (
        f"the brightest pixel of {scaled:,} images of 16 bits is {brightest:,} of 65,535, "
        f"{pixel} of 255 after scaling; if they hold {bits} bits in 16, multiply their pixels by "
        f"{65535 // (2**bits - 1)}"
    )
    return (note,)


def make_decoder(where: str, size: int | None, channels: int | None) -> Decoder:
    """Return a decoder for what the user asks for.

    Args:
        where: Names the data in errors.
        size: Pixels a side; None for the default.
        channels: 1 or 3; None to decide by the images.

    Raises:
        DataError: The size or the number of channels is not valid.
    """
    size = DEFAULT_IMAGE_SIZE if size is None else size
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise DataError(f"{where}: got image_size {size!r}, expected an integer of at least 1")
    if channels not in (None, 1, 3) or isinstance(channels, bool):
        raise DataError(f"{where}: got channels {channels!r}, expected 1 (grey) or 3 (colour)")
    return Decoder(size, channels)


def import_pillow(place: str) -> ModuleType:
    """Import PIL.Image.

    Raises:
        DataError: Pillow is not installed; names `place`.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError(
            f"{place}: reading images requires Pillow; install it with: pip install pillow"
        ) from error
    return Image


@contextlib.contextmanager
def _refuse_broken_images(place: str) -> Iterator[None]:
    """Raise DataError for everything that Pillow raises on files that are no images."""
    pillow = import_pillow(place)
    try:
        yield
    except (
        OSError,
        SyntaxError,
        ValueError,
        MemoryError,
        pillow.DecompressionBombError,
    ) as error:
        reason = getattr(error, "strerror", None) or error
        if isinstance(error, MemoryError):
            reason = "it needs more memory than there is"
        if isinstance(error, pillow.UnidentifiedImageError):
            reason = f"not one of {', '.join(IMAGE_FORMATS)}"
        raise DataError(
            f"{place}: cannot be read ({reason}), expected an image; replace or remove it"
        ) from error


def open_image(content: bytes, place: str) -> "Image":
    """Return the image of a file's bytes; it is decoded when it is converted.

    Raises:
        DataError: The bytes are no image; the error names the `place`.
    """
    pillow = import_pillow(place)
    with _refuse_broken_images(place):
        return pillow.open(io.BytesIO(content), formats=IMAGE_FORMATS)


def turn_upright(image: "Image", place: str) -> "Image":
    """Decode an image and turn it as its EXIF orientation says; a broken EXIF block turns nothing.

    Raises:
        DataError: The image cannot be decoded; the error names the `place`.
    """
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    with _refuse_broken_images(place):
        image.load()  # which turns TIFF files, and reads what follows the pixels of PNG files
        turn = turns.get(_read_orientation(image))
        if turn is None:
            return image
        turned = image.transpose(turn)
    turned.format = image.format
    return turned


def _read_orientation(image: "Image") -> int:
    """Return the EXIF orientation of an image; 1, which turns nothing, if it cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return image.getexif().get(_ORIENTATION) or 1
    except Exception:  # Pillow raises errors of many kinds
        return 1


def is_pillow_image(value: object) -> "TypeGuard[Image]":
    """Return whether a value is an image of Pillow, without importing Pillow."""
    pillow = sys.modules.get("PIL.Image")
    return pillow is not None and isinstance(value, pillow.Image)


def is_grey(image: "Image") -> bool:
    """Return whether an image has no colour by its mode."""
    return image.mode in _GREY_MODES or image.mode.startswith("I;16")


def _is_grey(file: str) -> bool:
    """Return whether a file holds a grey image; False if it cannot be read, which decoding says."""
    pillow = import_pillow(file)
    try:
        with (
            open_regular(file) as opened,
            pillow.open(opened, formats=IMAGE_FORMATS) as image,
        ):
            return is_grey(image)
    except (OSError, SyntaxError, ValueError, MemoryError, pillow.DecompressionBombError):
        return False
