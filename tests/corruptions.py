"""A folder of corrupted digits in the format of CIFAR-10-C."""

import numpy

import robustsoup as rs


def write_corruptions(folder):
    """Write copies of the test images: unchanged, and black from severity 3 on."""
    data = rs.load_data("digits").test
    images = data.images.permute(0, 2, 3, 1).numpy()
    black = [images if severity < 3 else images * 0 for severity in range(1, 6)]
    folder.mkdir()
    numpy.save(folder / "labels.npy", numpy.tile(data.labels.numpy(), 5))
    numpy.save(folder / "none.npy", numpy.concatenate([images] * 5))
    numpy.save(folder / "black.npy", numpy.concatenate(black))
    return folder
