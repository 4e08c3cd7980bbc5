"""Whether a split is fresh to every ingredient: known, unknown or violated."""

from collections.abc import Sequence

from robustsoup.checkpoints import Checkpoint
from robustsoup.data import Split
from robustsoup.errors import LeakageError

KNOWN, UNKNOWN, VIOLATED = "known", "unknown", "violated"


def split_status(checkpoints: Sequence[Checkpoint], data: Split) -> tuple[str, str]:
    """("known" | "unknown" | "violated", why) for using `data` to judge these checkpoints.

    known: every record says that the checkpoint was fitted on other samples of the same split of the same data.
    unknown: a file has no record, or one of other data. violated: fitted on this split, or the split differs.
    """
    unknown = ""
    for checkpoint in checkpoints:
        theirs = checkpoint.provenance.get("data")
        if not theirs:
            unknown = unknown or f"{checkpoint.name}: no record of the samples it was trained on"
        elif theirs["digest"] != data.record["digest"]:
            unknown = unknown or f"{checkpoint.name}: trained on other data ({theirs['name']})"
        elif data.name in checkpoint.provenance.get("trained_on", []):
            return VIOLATED, f"{checkpoint.name}: was trained on the {data.name} split itself"
        elif theirs["split_digest"] != data.record["split_digest"] and data.name != "test":
            return VIOLATED, (
                f"{checkpoint.name}: was trained with another split (seed {theirs['seed']}), so samples of this "
                f"{data.name} split (seed {data.record['seed']}) may have been in its training set"
            )
    return (UNKNOWN, unknown) if unknown else (KNOWN, "")


def check_leakage(checkpoints: Sequence[Checkpoint], data: Split, *, allow: bool = False) -> tuple[str, str]:
    """`split_status`, but violated is refused unless `allow`. Raises LeakageError, which says why."""
    status, why = split_status(checkpoints, data)
    if status == VIOLATED and not allow:
        raise LeakageError(f"{why}; selecting on it would flatter the soup. Use the same split, or --allow-leakage")
    return status, why


def check_same_split(checkpoints: Sequence[Checkpoint], data: Split, *, allow: bool = False) -> None:
    """Refuse ingredients that were fitted on another split of `data` than the one it belongs to, unless `allow`.

    What one of them was trained on another would hold out, so no sample is left to judge their soup on.
    Raises LeakageError, naming the first such file. Files without a record are let through.
    """
    for checkpoint in checkpoints:
        theirs = checkpoint.provenance.get("data") or {}
        if (
            theirs.get("digest") == data.record["digest"]
            and theirs["split_digest"] != data.record["split_digest"]
            and not allow
        ):
            raise LeakageError(
                f"{checkpoint.name}: was trained with another split of {theirs['name']} (seed {theirs['seed']}) than this one "
                f"(seed {data.record['seed']}), so no sample is fresh to all ingredients. Use ingredients of one split, "
                "or --allow-leakage"
            )
