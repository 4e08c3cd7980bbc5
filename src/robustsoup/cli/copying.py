"""Checkpoints of other places, which a command copies here before it uses them."""

from pathlib import Path

from robustsoup.checkpoints.remote import copy_remote, remote_address
from robustsoup.checkpoints.transfers import show_address
from robustsoup.cli.progress import Bar
from robustsoup.runs.caches import hold_caches


def copy_checkpoint(place: str | Path, *, again: bool = False) -> Path:
    """Return a path of this machine; the checkpoint of an address is copied here, with a bar.

    Args:
        place: A path or an address.
        again: Copy an address again even if there is a copy.
    """
    address = remote_address(place)
    if address is None:
        return Path(place)
    hold_caches()
    with Bar(f"copying {show_address(address)}") as bar:
        return copy_remote(address, again=again, on_transfer=bar).path
