"""Whether a split is fresh to every ingredient: known, unknown or violated."""

from collections.abc import Sequence

from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.data import Split
from robustsoup.errors import LeakageError

KNOWN, UNKNOWN, VIOLATED = "known", "unknown", "violated"


def split_status(checkpoints: Sequence[Checkpoint], data: Split) -> tuple[str, str]:
    """("known" | "unknown" | "violated", why) for using `data` to judge these checkpoints.

    known: every record says that the checkpoint, and what it was fine-tuned from, was fitted on other samples of the same
    split of the same data. unknown: there is no record, or one of other data. violated: fitted on this split, or the split
    differs.
    """
    unknown = ""
    for checkpoint, theirs in [(item, data) for item in checkpoints for data in _seen(item)]:
        if not theirs:
            unknown = (
                unknown or f"{checkpoint.name}: no record of all the samples it was trained on"
            )
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


def _seen(checkpoint: Checkpoint) -> list[dict | None]:
    """The records of what a checkpoint was fitted on, its own first, then its ancestors'; None where there is none."""
    return [checkpoint.provenance.get("data"), *checkpoint.provenance.get("earlier_data", [])]


def earlier_data(origin: Checkpoint, data: Split) -> list[dict | None]:
    """What is recorded of a checkpoint that is fitted to `data` from `origin`: all other data that went into it."""
    return [theirs for theirs in _seen(origin) if theirs != data.record]


def check_leakage(
    checkpoints: Sequence[Checkpoint], data: Split, *, allow: bool = False
) -> tuple[str, str]:
    """`split_status`, but violated is refused unless `allow`. Raises LeakageError, which says why."""
    status, why = split_status(checkpoints, data)
    if status == VIOLATED and not allow:
        raise LeakageError(
            f"{why}; selecting on it would flatter the soup. Use the same split, or --allow-leakage"
        )
    return status, why


def check_same_split(
    checkpoints: Sequence[Checkpoint], data: Split, *, allow: bool = False
) -> None:
    """Refuse ingredients that were fitted on another split of `data` than the one it belongs to, unless `allow`.

    What one of them was trained on another would hold out, so no sample is left to judge their soup on.
    Nothing but test is held out where `data` is train and val together (Data.unsplit), and any of them will do.
    Raises LeakageError, naming the first such file. Files without a record are let through.
    """
    if data.record["val"] == 0:
        return
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
