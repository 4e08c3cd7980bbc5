"""Damaged copies of a file: seeded single-bit flips and truncations."""

import random


def flip_bits(content, count, seed=0):
    """Yield copies of the content with one flipped bit each, at different places."""
    chosen = random.Random(seed).sample(range(8 * len(content)), min(count, 8 * len(content)))
    for bit in chosen:
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        yield bytes(damaged)


def cut_short(content, count, seed=0):
    """Yield the beginnings of the content, of different lengths."""
    lengths = random.Random(seed).sample(range(len(content)), min(count, len(content)))
    yield from (content[:length] for length in lengths)
