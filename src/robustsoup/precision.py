"""Compute in float32, whatever precision flags of PyTorch are set."""

import contextlib
import threading
from collections.abc import Callable, Generator

import torch

_PARENTS = (("generic", "all"), ("cuda", "all"), ("mkldnn", "all"))
"""Backends whose precision their operators inherit, outermost first."""
_OPERATORS = (
    ("cuda", "matmul"),
    ("cuda", "conv"),
    ("cuda", "rnn"),
    ("mkldnn", "matmul"),
    ("mkldnn", "conv"),
    ("mkldnn", "rnn"),
)
_HAS_OPERATOR_FLAGS = hasattr(torch._C, "_set_fp32_precision_setter")


@contextlib.contextmanager
def full_float32() -> Generator[None, None, None]:
    """Compute float32 in float32: without TF32, bfloat16 products or a caller's autocast.

    The precision of each backend and operator and the default dtype belong to the process. They
    are set when the first thread enters and restored when the last thread leaves, so entries may
    nest, and may overlap between threads. Autocast belongs to the thread. Flags that concern
    half-precision products alone stay as they are. cuDNN is held to deterministic algorithms, whose
    choice does not depend on timings, so that two runs on one device agree bit for bit.
    """
    with contextlib.ExitStack() as stack:
        for device_type in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        stack.enter_context(_PRECISION.held())
        yield


class _ProcessPrecision:
    """The precision settings of the process, and the number of threads that hold them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holders = 0
        self._restore: Callable[[], None]

    @contextlib.contextmanager
    def held(self) -> Generator[None, None, None]:
        """Hold every setting at full float32."""
        with self._lock:
            if self._holders == 0:
                self._restore = _set_full_float32()
            self._holders += 1
        try:
            yield
        finally:
            with self._lock:
                self._holders -= 1
                if self._holders == 0:
                    self._restore()


_PRECISION = _ProcessPrecision()


def _set_full_float32() -> Callable[[], None]:
    """Set full float32 everywhere, and return a function that restores the earlier settings."""
    cudnn, default_dtype = torch.backends.cudnn, torch.get_default_dtype()
    choice = cudnn.deterministic, cudnn.benchmark
    torch.set_default_dtype(torch.float32)
    cudnn.deterministic, cudnn.benchmark = True, False
    restore_flags = _set_flags_of_operators() if _HAS_OPERATOR_FLAGS else _set_flags()

    def restore() -> None:
        restore_flags()
        cudnn.deterministic, cudnn.benchmark = choice
        torch.set_default_dtype(default_dtype)

    return restore


def _set_flags() -> Callable[[], None]:
    """Set the two flags of PyTorch before 2.9."""
    matmul, allow_tf32 = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32

    def restore() -> None:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = allow_tf32

    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    return restore


def _set_flags_of_operators() -> Callable[[], None]:
    """Set the precision of each operator, and the older flags to what agrees with it.

    An operator's getter returns what it inherits if it has no setting of its own, so parents are
    read and cleared first. The older flags raise an error where they disagree with the newer
    ones, so they are read while every operator is at "ieee".
    """
    # torch.backends.mkldnn.fp32_precision sets that of torch.backends instead of its own (PyTorch
    # 2.9 to 2.13), so the functions behind these attributes are called.
    get_precision = torch._C._get_fp32_precision_getter
    set_precision = torch._C._set_fp32_precision_setter
    own = {}
    for key in (*_PARENTS, *_OPERATORS):
        own[key] = get_precision(*key)
        set_precision(*key, "none")
    for key in _OPERATORS:
        set_precision(*key, "ieee")
    matmul, allow_tf32 = torch.get_float32_matmul_precision(), _reads_allow_tf32()

    def restore() -> None:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = allow_tf32
        for key, value in own.items():
            set_precision(*key, value)

    # These two also set operators, so the operators are set once more.
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    for key in _OPERATORS:
        set_precision(*key, "ieee")
    return restore


def _reads_allow_tf32() -> bool:
    """Return the older flag of cuDNN; while every operator is at "ieee", it raises if it is set."""
    try:
        return torch.backends.cudnn.allow_tf32
    except RuntimeError:
        return True
