"""The processes of one command ("ranks"), and what they exchange over torch.distributed.

`torchrun --nproc-per-node N -m robustsoup COMMAND ...` starts N processes of one command, and the
command line calls `start`. In a single process every function here answers at once, and
torch.distributed is not imported. All ranks call the exchanging functions in the same order; where
one rank fails, the others lose the connection to it and fail too.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from typing import TYPE_CHECKING, TypeVar

from robustsoup.errors import RequestError, WorkError
from robustsoup.printable import first_line
from robustsoup.stamp import describe_release

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.distributed import Store

T = TypeVar("T")

MEETING_TIMEOUT = timedelta(minutes=10)
"""How long a rank waits for the others to start."""
EXCHANGE_TIMEOUT = timedelta(days=1)
"""How long a rank waits for a slower one; a rank that ended closes its connections at once."""
SAME_VERSION = "install the same version on every machine"
"""What to do about other versions."""
SHOWN_DIGITS = 12
"""Characters of a digest in an error."""


@dataclass
class _Group:
    """The ranks of this command.

    Attributes:
        rank: Number of this process, from 0.
        world: Number of processes.
        local_rank: Number of this process among those of its machine.
        store: Key-value store that all ranks reach.
        exchanged_bytes: Bytes of the tensors that this rank has put into sums.
    """

    rank: int
    world: int
    local_rank: int
    store: "Store"
    exchanged_bytes: int = 0


_group: _Group | None = None
_EXCHANGE_WORDS = ("gloo", "NCCL", "onnection", "socket", "timed out", "timeout")
"""What errors of an exchange speak of; PyTorch has no type for all of them."""


def requested_world() -> int:
    """Return the number of processes that torchrun's variables ask for; 1 without them.

    Raises:
        RequestError: A variable is not a number.
    """
    return _read_variable("WORLD_SIZE", 1) if "RANK" in os.environ else 1


def rank() -> int:
    """Return the number of this process, from 0."""
    return 0 if _group is None else _group.rank


def world() -> int:
    """Return the number of processes."""
    return 1 if _group is None else _group.world


def local_rank() -> int:
    """Return the number of this process among those of its machine, from 0."""
    return 0 if _group is None else _group.local_rank


def is_first() -> bool:
    """Return whether this process prints, shows progress and writes results."""
    return rank() == 0


def exchanged_bytes() -> int:
    """Return the bytes of the tensors that this rank has put into sums so far."""
    return 0 if _group is None else _group.exchanged_bytes


def start() -> None:
    """Join the processes that torchrun started; do nothing in a single process.

    Raises:
        RequestError: The other processes run another version of robustsoup or PyTorch, or torchrun
            did not start this one.
        WorkError: The other processes are not reached.
    """
    global _group  # noqa: PLW0603 - a process has one group for its whole life
    if _group is not None or requested_world() == 1:
        return
    import torch
    from torch import distributed

    number, count = _read_variable("RANK", 0), requested_world()
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise RequestError(
                f"${name}: not set, although $RANK and $WORLD_SIZE are; start the command with "
                "torchrun"
            )
    local = _read_variable("LOCAL_RANK", number)
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(min(local, torch.cuda.device_count() - 1))
    with named_failure():
        store, _, _ = next(iter(distributed.rendezvous("env://", timeout=MEETING_TIMEOUT)))
        # torchrun may keep one store for all its attempts, with the addresses of lost processes.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = distributed.PrefixStore(f"robustsoup {attempt} of {count}", store)
        distributed.init_process_group(
            backend, store=store, rank=number, world_size=count, timeout=EXCHANGE_TIMEOUT
        )
    _group = _Group(number, count, local, store)
    check_same(required_versions(), SAME_VERSION)


def required_versions() -> dict[str, str]:
    """Return the versions that all processes of a run must have, by what they are."""
    import torch

    return {
        "version of robustsoup": describe_release(),
        "version of PyTorch": torch.__version__,
    }


def stop() -> None:
    """Leave the group, if there is one."""
    global _group  # noqa: PLW0603
    if _group is not None:
        from torch import distributed

        distributed.destroy_process_group()
        _group = None


def claim_message() -> bool:
    """Return whether this rank prints why the command ended: the first that asks does."""
    if _group is None:
        return True
    try:
        return _group.store.add("message", 1) == 1
    except RuntimeError:  # the store ended with the process that held it
        return is_first()


def gather(value: T) -> list[T]:
    """Return the value of each rank, in the order of the ranks."""
    if _group is None:
        return [value]
    from torch import distributed

    values: list[T | None] = [None] * _group.world
    with named_failure():
        distributed.all_gather_object(values, value)
    return values  # pyrefly: ignore[bad-return]  # every entry was replaced


def from_first(make: Callable[[], T]) -> T:
    """Return, in all ranks, what `make` returns in the first."""
    if _group is None:
        return make()
    from torch import distributed

    values = [make() if is_first() else None]
    with named_failure():
        distributed.broadcast_object_list(values, src=0)
    return values[0]  # pyrefly: ignore[bad-return]  # it holds the value of the first rank


def sum_ranks(tensor: "Tensor") -> "Tensor":
    """Replace a tensor by its sum over all ranks, in place, and return it."""
    if _group is None:
        return tensor
    from torch import distributed

    with named_failure():
        distributed.all_reduce(tensor)
    count_exchange(tensor)
    return tensor


def count_exchange(tensor: "Tensor") -> None:
    """Count a tensor that this rank puts into a sum."""
    if _group is not None:
        _group.exchanged_bytes += tensor.nbytes


def merge_rows(rows: "Tensor", owned: "Tensor") -> "Tensor":
    """Return a tensor whose rows are those of the rank that owns each, bit for bit.

    Args:
        rows: (n, ...) on the CPU.
        owned: (n,) bool, the rows of this rank; each row has exactly one owner.
    """
    if _group is None:
        return rows
    import torch

    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    # Sums of integers are exact, and keep NaN and the sign of 0.
    bits = rows.contiguous().view(integers[rows.element_size()]).clone()
    bits[~owned] = 0
    if bits.element_size() == 2:
        return sum_ranks(bits.int()).to(torch.int16).view(rows.dtype)
    return sum_ranks(bits).view(rows.dtype)


def deal(n: int, together: int = 1) -> "Tensor":
    """Return which of n items this rank gets: (n,) bool.

    Args:
        n: Number of items.
        together: Consecutive items that go to one rank; blocks of them are dealt in turn.
    """
    import torch

    return torch.arange(n) // together % world() == rank()


def take_own(items: Iterable[T]) -> Iterator[T]:
    """Iterate over the items of this rank; they are dealt in turn."""
    return islice(items, rank(), None, world())


def check_same(values: Mapping[str, str], advice: str) -> None:
    """Check that values are the same in all ranks.

    Args:
        values: Text by what it is, such as "digest of the data".
        advice: What to do if they differ.

    Raises:
        RequestError: In all ranks; names the first value that differs and a rank.
    """
    everywhere = gather(dict(values))
    for number, others in enumerate(everywhere):
        for name, expected in everywhere[0].items():
            if others[name] != expected:
                raise RequestError(
                    f"{name}: got {_shorten(others[name])} in rank {number}, expected "
                    f"{_shorten(expected)} as in rank 0; {advice}"
                )


def describe_device(device: "torch.device") -> str:
    """Return what must be the same in all ranks: the GPU's name, or the kernels of a CPU."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"cpu with {torch.backends.cpu.get_cpu_capability()} kernels"
    return device.type


@contextmanager
def local_first() -> Iterator[None]:
    """Run the block in the first process of each machine, and then in its other processes.

    What the first one downloads or decodes into a cache, the others read.
    """
    if local_rank() != 0:
        gather(None)
    yield
    if local_rank() == 0:
        gather(None)


@contextmanager
def named_failure() -> Iterator[None]:
    """Turn the errors of an exchange into one line; other errors pass.

    Raises:
        WorkError: Another rank has ended or is not reached.
    """
    try:
        yield
    except RuntimeError as error:
        if not any(word in str(error) for word in _EXCHANGE_WORDS):
            raise
        raise WorkError(
            f"rank {rank()}: lost the connection to another rank ({first_line(error)}); "
            "run the same command again to resume"
        ) from error


def _read_variable(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise RequestError(
            f'${name}: got "{text}", expected a number; start the command with torchrun'
        ) from None


def _shorten(text: str) -> str:
    is_digest = len(text) > SHOWN_DIGITS and text.isalnum()
    return text[:SHOWN_DIGITS] if is_digest else text
