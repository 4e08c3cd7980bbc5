"""Data sets, in memory or memory-mapped, split into train, val and test, and batches from them."""

from robustsoup.data.batches import augment, batches, passes, to_float
from robustsoup.data.cifar import data_root, fetch_cifar10
from robustsoup.data.sources import DATASETS, load_data
from robustsoup.data.splits import Augmentation, Data, DataRecord, Split
from robustsoup.data.synthetic import Synthetic, mixed_batches

__all__ = [
    "DATASETS",
    "Augmentation",
    "Data",
    "DataRecord",
    "Split",
    "Synthetic",
    "augment",
    "batches",
    "data_root",
    "fetch_cifar10",
    "load_data",
    "mixed_batches",
    "passes",
    "to_float",
]
