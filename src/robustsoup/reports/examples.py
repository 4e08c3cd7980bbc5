"""Adversarial images beside their originals, from the examples that a run stored."""

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.image import imsave

from robustsoup.errors import RequestError
from robustsoup.reports.file_names import hide_folders
from robustsoup.reports.measures import CLEAN, StoredRun
from robustsoup.runs.examples import AttackedExamples, Examples
from robustsoup.runs.results import Results

MOST_BYTES = 1_500_000
"""Most bytes of all pictures together; pictures beyond them are left out."""


@dataclass(frozen=True)
class ExamplePicture:
    """One attacked sample: three pictures as base64 of PNG files."""

    title: str
    caption: str
    original: str
    attacked: str
    difference: str


@dataclass(frozen=True)
class ExamplePage:
    """The pictures, and how they were made."""

    caption: str
    pictures: Sequence[ExamplePicture]


def read_examples(run: StoredRun) -> tuple[ExamplePage | None, str]:
    """Read the examples of a run.

    Returns:
        The pictures, or None; and why stored ones cannot be shown.
    """
    stored = run.results.examples
    if stored is None:
        return None, ""
    try:
        examples = Examples.load(run.folder / stored.file)
        pictures = list(_limit_bytes(_draw_pictures(examples, run.results)))
    except RequestError as error:
        return None, str(error)
    caption = (
        f"The first samples of {stored.split}, attacked on {stored.network}: the original, the "
        "attacked image, and their difference from grey, stretched to the full range."
    )
    return ExamplePage(caption, pictures), ""


def _limit_bytes(pictures: Iterator[ExamplePicture]) -> Iterator[ExamplePicture]:
    total = 0
    for picture in pictures:
        total += len(picture.original) + len(picture.attacked) + len(picture.difference)
        if total > MOST_BYTES:
            return
        yield picture


def _draw_pictures(examples: Examples, results: Results) -> Iterator[ExamplePicture]:
    """Draw each sample under each threat model."""
    threats = [threat for threat in results.protocol.threats if threat != CLEAN]
    names = results.data.get("classes")
    names = list(names) if isinstance(names, (list, tuple)) else []

    def name_class(number: int) -> str:
        return hide_folders(str(names[number])) if 0 <= number < len(names) else str(number)

    for threat, attacked in zip(threats, examples.attacked, strict=False):
        for k in range(len(examples.labels)):
            label, clean, fooled = (
                name_class(int(classes[k]))
                for classes in (examples.labels, examples.prediction, attacked.prediction)
            )
            verdict = "robust" if bool(attacked.robust[k]) else f"classified as {fooled}"
            if clean != label:
                verdict = f"wrong without an attack: {clean}"
            yield ExamplePicture(
                title=f"{label}, {threat}",
                caption=f"{label}, {threat}: {verdict}",
                **_draw_triple(examples, attacked, k),
            )


def _draw_triple(examples: Examples, attacked: AttackedExamples, k: int) -> dict[str, str]:
    original = examples.images[k].numpy().astype(np.float32) / 255
    delta = attacked.delta[k].numpy().astype(np.float32)
    largest = float(np.abs(delta).max()) or 1.0
    return {
        "original": _encode_png(original),
        "attacked": _encode_png(original + delta),
        "difference": _encode_png(0.5 + delta / (2 * largest)),
    }


def _encode_png(image: np.ndarray) -> str:
    """Return an image (c, h, w) in [0, 1] as base64 of a PNG file."""
    pixels = np.round(255 * np.clip(np.nan_to_num(image), 0, 1)).astype(np.uint8)
    pixels = np.repeat(pixels, 3, axis=0) if len(pixels) == 1 else pixels
    file = io.BytesIO()
    imsave(file, np.ascontiguousarray(pixels.transpose(1, 2, 0)), format="png")
    return base64.b64encode(file.getvalue()).decode("ascii")
