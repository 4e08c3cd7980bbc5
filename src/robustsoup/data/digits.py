"""The digits data set, embedded: 1797 handwritten digits of 8x8 grey pixels, for work offline.

Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine
Learning Repository, 1998, doi:10.24432/C50P49, licensed CC BY 4.0; its test part, in the order of
scikit-learn's load_digits.
"""

from pathlib import Path

import numpy
import torch

from robustsoup.data.request import DataRequest
from robustsoup.data.splits import (
    Data,
    DataDescription,
    Samples,
    assemble,
    channel_statistics,
    content_digest,
    hold_out,
)

DIGITS_TEST_SAMPLES = 500
DIGITS_VAL_SAMPLES = 297


def load_digits(request: DataRequest) -> Data:
    """Load the embedded digits: 1000 train, 297 val, 500 test; images uint8 (n, 1, 8, 8).

    The source's values 0..16 become round(v * 255 / 16). The seed decides which samples are in
    val; test is always the same. ids are the source's row numbers in all three splits. mean and
    std are of train and val together.
    """
    samples = _read_digits()
    pool, test = (
        samples.take(rows) for rows in hold_out(len(samples), DIGITS_TEST_SAMPLES, "digits test")
    )
    train, val = (pool.take(rows) for rows in hold_out(len(pool), DIGITS_VAL_SAMPLES, request.seed))
    mean, std = channel_statistics(pool.images)
    classes = tuple("0123456789")
    description = DataDescription("digits", content_digest(samples), classes, mean, std)
    return assemble(description, train, val, test, seed=request.seed)


def _read_digits() -> Samples:
    with numpy.load(Path(__file__).with_name("digits.npz"), allow_pickle=False) as stored:
        images, labels = torch.from_numpy(stored["images"]), torch.from_numpy(stored["labels"])
    scaled = (images.double() * 255 / 16).round().to(torch.uint8)
    return Samples(scaled.unsqueeze(1), labels.long(), torch.arange(len(labels)))
