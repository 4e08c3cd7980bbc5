"""The seed of the networks that tests train."""

import os


def trained_seed(base: int = 0) -> int:
    """Return the seed of a trained network: `base`, unless ROBUSTSOUP_TEST_SEED chooses others."""
    return base + 1001 * int(os.environ.get("ROBUSTSOUP_TEST_SEED", "0"))
