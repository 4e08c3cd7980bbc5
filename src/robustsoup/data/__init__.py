"""Data sets, split into train, val and test, and batches from them."""

from robustsoup.data.batches import augment, batches, passes, to_float
from robustsoup.data.cifar import fetch_cifar10, fetch_cifar100
from robustsoup.data.download import data_root
from robustsoup.data.given import SplitLike, as_optional_split, as_split
from robustsoup.data.request import DataRequest
from robustsoup.data.sources import load_data
from robustsoup.data.splits import (
    Augmentation,
    Data,
    DataDescription,
    DataRecord,
    Samples,
    Split,
    assemble,
    content_digest,
    hold_out,
)
from robustsoup.data.synthetic import Synthetic, mixed_batches

__all__ = [
    "Augmentation",
    "Data",
    "DataDescription",
    "DataRecord",
    "DataRequest",
    "Samples",
    "Split",
    "SplitLike",
    "Synthetic",
    "as_optional_split",
    "as_split",
    "assemble",
    "augment",
    "batches",
    "content_digest",
    "data_root",
    "fetch_cifar10",
    "fetch_cifar100",
    "hold_out",
    "load_data",
    "mixed_batches",
    "passes",
    "to_float",
]
