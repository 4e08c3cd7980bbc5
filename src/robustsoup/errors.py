"""The exception tree. The command line turns a RequestError into exit code 2 and a WorkError into exit code 1.

RobustsoupError
├── RequestError               the request was wrong; nothing was done
│   ├── ThreatError            a threat model or objective that does not parse, eps below 0
│   ├── ModelError             a network that cannot be built, or does not fit the data or the weights
│   ├── DataError              data that is missing, broken, empty or of the wrong shape
│   ├── CheckpointError        a file that is not a checkpoint, is cut short, or holds NaN
│   │   └── IngredientMismatch ingredients whose names, shapes or dtypes differ
│   ├── CoefficientError       coefficients of the wrong number, negative, or not summing to 1
│   ├── RecipeError            an unknown key or a wrong value in a recipe
│   └── LeakageError           selection on samples that an ingredient was trained on
└── WorkError                  the request was fine; the work failed
    ├── Diverged               a loss or a weight became NaN or infinite
    └── StorageError           a result could not be written (no space left, no permission)
"""


class RobustsoupError(Exception):
    """Every error that robustsoup raises on purpose. Its text is one line: what, where, got, expected, what to do."""


class RequestError(RobustsoupError):
    """The request was wrong; nothing was done and nothing was changed."""


class ThreatError(RequestError):
    """A threat model or objective that cannot be parsed or makes no sense."""


class ModelError(RequestError):
    """A network that cannot be built, or does not fit the data or the weights."""


class DataError(RequestError):
    """Data that is missing, broken, empty or of the wrong shape."""


class CheckpointError(RequestError):
    """A file that is not a readable checkpoint."""


class IngredientMismatch(CheckpointError):
    """Ingredients that do not share names, shapes and dtypes."""


class CoefficientError(RequestError):
    """Coefficients of the wrong number, negative, or not summing to 1."""


class RecipeError(RequestError):
    """An unknown key or a wrong value in a recipe."""


class LeakageError(RequestError):
    """Selection on samples that an ingredient was trained on."""


class WorkError(RobustsoupError):
    """The request was fine; the work failed."""


class Diverged(WorkError):
    """A loss or a weight became NaN or infinite."""


class StorageError(WorkError):
    """A result could not be written."""
