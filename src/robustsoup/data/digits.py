"""The digits data set, embedded: 1797 real handwritten digits of 8x8 grey pixels, so that a first run needs no network.

Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998,
doi:10.24432/C50P49, licensed CC BY 4.0; its test part, in the order in which scikit-learn's load_digits gives it.
"""

from pathlib import Path

import numpy
import torch

from robustsoup.data.splits import (
    Data,
    DataDescription,
    Samples,
    assemble,
    channel_statistics,
    content_digest,
    hold_out,
)

TEST = 500
VAL = 297


def load_digits(seed: int) -> Data:
    """Read the embedded digits: 1000 train, 297 val, 500 test; images uint8 (n, 1, 8, 8).

    The source's 0..16 become round(v * 255 / 16). The seed decides who is in val; the test part is always the same.
    ids are the source's row numbers in all three splits. mean and std are of train and val together.
    """
    samples = _read()
    others, test = (samples.take(rows) for rows in hold_out(len(samples), TEST, "digits test"))
    train, val = (others.take(rows) for rows in hold_out(len(others), VAL, seed))
    mean, std = channel_statistics(others.images)
    source = DataDescription("digits", content_digest(samples), tuple("0123456789"), mean, std)
    return assemble(source, train, val, test, seed=seed)


def _read() -> Samples:
    with numpy.load(Path(__file__).with_name("digits.npz"), allow_pickle=False) as stored:
        images, labels = torch.from_numpy(stored["images"]), torch.from_numpy(stored["labels"])
    scaled = (images.double() * 255 / 16).round().to(torch.uint8)
    return Samples(scaled.unsqueeze(1), labels.long(), torch.arange(len(labels)))
