"""What a process of a command does to itself before it begins; see `Command`."""

import os
import random
import time

NOBODY = 65534


def become_nobody():
    """Give up root's right to read and write everywhere."""
    os.setgid(NOBODY)
    os.setuid(NOBODY)


def jump_clock():
    """Let the clock jump by years, forwards and backwards, at each look at it."""
    generator, read, read_ns = random.Random(0), time.time, time.time_ns
    years = 365 * 86_400
    time.time = lambda: read() + generator.choice((-20, -1, 0, 1, 20)) * years
    time.time_ns = lambda: read_ns() + generator.choice((-20, -1, 0, 1, 20)) * years * 10**9
