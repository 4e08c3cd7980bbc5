"""Exceptions that robustsoup raises on purpose.

The command line exits with code 1 for a WorkError and with code 2 for any other RequestError.

    RobustsoupError
    ├── RequestError               the request is wrong; nothing was done
    │   ├── ThreatError            a threat model or objective that cannot be parsed, or eps < 0
    │   ├── ModelError             a network that cannot be built or does not fit data or weights
    │   ├── DataError              data that is missing, corrupt, empty or of the wrong shape
    │   ├── CheckpointError        a file that is no checkpoint, is truncated or contains NaN
    │   │   └── IngredientMismatch ingredients that differ in a name, shape or dtype
    │   ├── CoefficientError       coefficients of the wrong number, negative, or not summing to 1
    │   ├── RecipeError            an unknown key or an invalid value in a recipe
    │   └── LeakageError           selection on samples that an ingredient was trained on
    └── WorkError                  the request is valid; the work failed
        ├── Diverged               a loss or a weight became NaN or infinite
        ├── StorageError           a result cannot be written (disk full, no permission)
        └── DownloadError          a file cannot be downloaded; also a DataError
"""

from robustsoup.printable import make_message


class RobustsoupError(Exception):
    """Base class of all errors that robustsoup raises on purpose.

    The text is one line: what is wrong, where, the value found, the value expected, what to do.
    It may quote names from files; characters that are not printable are escaped.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(make_message(message))


class RequestError(RobustsoupError):
    """The request is wrong; nothing was done and nothing was changed."""


class ThreatError(RequestError):
    """A threat model or objective cannot be parsed or is impossible."""


class ModelError(RequestError):
    """A network cannot be built, or does not fit the data or the weights."""


class DataError(RequestError):
    """Data is missing, corrupt, empty or of the wrong shape."""


class CheckpointError(RequestError):
    """A file is not a readable checkpoint."""


class IngredientMismatch(CheckpointError):
    """Ingredients differ in the names, shapes or dtypes of their tensors."""


class CoefficientError(RequestError):
    """Coefficients have the wrong number, are negative, or do not sum to 1."""


class RecipeError(RequestError):
    """A recipe has an unknown key or an invalid value."""


class LeakageError(RequestError):
    """Samples used for selection were used to train an ingredient."""


class WorkError(RobustsoupError):
    """The request is valid, but the work failed."""


class Diverged(WorkError):
    """A loss or a weight became NaN or infinite."""


class StorageError(WorkError):
    """A result cannot be written."""


class DownloadError(WorkError, DataError):
    """A file cannot be downloaded, or not completely, or is not the published one."""
