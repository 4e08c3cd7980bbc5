"""Check whether the samples of a split were used to train an ingredient."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.data import DataRecord, Split
from robustsoup.data.sketches import Sketch, count_shared, join_sketches
from robustsoup.errors import LeakageError

LeakageStatus = Literal["known", "unknown", "violated"]
_BY_SEVERITY: tuple[LeakageStatus, ...] = ("known", "unknown", "violated")
_OR_ALLOW = "or --allow-leakage (allow_leakage in a recipe or in Python)"


@dataclass(frozen=True)
class Leakage:
    """The finding about a split that is used to evaluate or select checkpoints.

    Attributes:
        status: "known": by their records, the checkpoints and their ancestors were fitted on other
            samples of the same split of the same data. "unknown": a record is
            missing or names other data. "violated": a checkpoint was fitted on this split, on
            another split of the same data, or on images of this split under another name.
        why: The first checkpoint that is not known to be clean, and the reason; empty if known.
    """

    status: LeakageStatus = "known"
    why: str = ""

    def as_record(self) -> dict[str, str]:
        """Return the JSON form that results and evaluations hold."""
        return asdict(self)


def worst_leakage(findings: Iterable[Leakage]) -> Leakage:
    """Return the first finding of the most severe status."""
    return max(findings, key=lambda finding: _BY_SEVERITY.index(finding.status))


def find_leakage(checkpoints: Sequence[Checkpoint], data: Split) -> Leakage:
    """Compare the data that checkpoints were fitted on with a split that evaluates them.

    Args:
        checkpoints: The ingredients, or a single checkpoint.
        data: The split that evaluates or selects them.
    """
    first_unknown = ""
    for checkpoint in checkpoints:
        for record in _fitted_data(checkpoint):
            finding = _compare_split(checkpoint, record, data)
            if finding.status == "violated":
                return finding
            first_unknown = first_unknown or finding.why
        for sketch in checkpoint.provenance.get("fitted_images", []):
            if why := _describe_shared_images(checkpoint, sketch, data):
                return Leakage("violated", why)
    return Leakage("unknown", first_unknown) if first_unknown else Leakage()


def _compare_split(checkpoint: Checkpoint, fitted: DataRecord | None, data: Split) -> Leakage:
    """Compare one data set that a checkpoint was fitted on with `data`."""
    if not fitted:
        why = f"{checkpoint.name}: no record of all the samples that it was trained on"
        return Leakage("unknown", why)
    if fitted["digest"] != data.record["digest"]:
        return Leakage("unknown", f"{checkpoint.name}: trained on other data ({fitted['name']})")
    if _was_fitted_on(checkpoint, data):
        why = f"{checkpoint.name}: was trained on the {data.name} split itself"
        return Leakage("violated", why)
    if fitted["split_digest"] != data.record["split_digest"] and data.name != "test":
        why = (
            f"{checkpoint.name}: was trained on another split (seed {fitted['seed']}), so its "
            f"training set may contain samples of this {data.name} split "
            f"(seed {data.record['seed']})"
        )
        return Leakage("violated", why)
    return Leakage()


def _was_fitted_on(checkpoint: Checkpoint, data: Split) -> bool:
    """Return whether a checkpoint with a record of this data was fitted on this very split.

    "trained_on" names the splits of all data behind a checkpoint. The sketches tell whose they are:
    a name counts unless there are sketches of other splits of this data, and one of other data has
    the name.
    """
    if data.name not in checkpoint.provenance.get("trained_on", []):
        return False
    sketches: list[Sketch] = checkpoint.provenance.get("fitted_images", [])
    digest = data.record["digest"]
    splits_here = {item["split"] for item in sketches if item["digest"] == digest}
    splits_elsewhere = {item["split"] for item in sketches if item["digest"] != digest}
    is_joined = any(not item["digest"] for item in sketches)
    is_of_others = data.name in splits_elsewhere and data.name not in splits_here
    return not splits_here or is_joined or not is_of_others


def _describe_shared_images(checkpoint: Checkpoint, sketch: Sketch, data: Split) -> str:
    """Say how many images of a sketch are in `data`; empty if none, or no more than duplicates.

    Within one data set the numbers of the samples decide, and a few equal images are duplicates,
    which `find_overlaps` counts; not so if they are half of either split.
    """
    hits, shared = count_shared(sketch, data)
    same_data = sketch["digest"] == data.record["digest"]
    if not hits or (same_data and 2 * shared < min(sketch["images"], len(data))):
        return ""
    return (
        f"{checkpoint.name}: was trained on images of this {data.name} split: about {shared:,} of "
        f"the {sketch['images']:,} images of {sketch['name']} {sketch['split']} are in it"
    )


def inherited_sketches(records: Iterable[Mapping[str, Any]]) -> list[Sketch]:
    """Return the sketches of the images that weights and their ancestors were fitted on.

    Args:
        records: The provenance of the checkpoints, and of coefficients.
    """
    return join_sketches([item for record in records for item in record.get("fitted_images", [])])


def _fitted_data(checkpoint: Checkpoint) -> list[DataRecord | None]:
    """Return the records of the data behind a checkpoint and its ancestors; None if unrecorded."""
    provenance = checkpoint.provenance
    return [provenance.get("data"), *provenance.get("earlier_data", [])]


def earlier_data(origin: Checkpoint, data: Split) -> list[DataRecord | None]:
    """Return the records of all other data behind a checkpoint that is now fitted to `data`.

    Args:
        origin: The checkpoint that is fine-tuned.
        data: The split that it is fine-tuned on.
    """
    return [record for record in _fitted_data(origin) if record != data.record]


def check_leakage(
    checkpoints: Sequence[Checkpoint], data: Split, *, allow: bool = False
) -> Leakage:
    """Find leakage and refuse a violated split.

    Args:
        checkpoints: The ingredients.
        data: The split that selects among their soups.
        allow: Whether to return a violation instead of raising it.

    Raises:
        LeakageError: A checkpoint was fitted on samples of `data`; the error says which and why.
    """
    finding = find_leakage(checkpoints, data)
    if finding.status == "violated" and not allow:
        raise LeakageError(
            f"{finding.why}; selecting on it would overestimate the soup. "
            f"Use the same split, {_OR_ALLOW}"
        )
    return finding


def stopped_early_on(checkpoint: Checkpoint, data: Split) -> bool:
    """Return whether a checkpoint stopped training early by the loss on a split.

    Training stops by the loss on the `val` beside the samples that it fits.
    """
    provenance = checkpoint.provenance
    if provenance.get("early_stopped_at") is None or data.name != "val":
        return False
    fitted: DataRecord | None = provenance.get("data")
    return bool(fitted) and fitted["split_digest"] == data.record["split_digest"]


def check_same_split(
    checkpoints: Sequence[Checkpoint], data: Split, *, allow: bool = False
) -> None:
    """Refuse ingredients that were fitted on another split of the data than `data`.

    No sample is left to select or evaluate a soup of such ingredients: the samples that one
    ingredient holds out are training samples of another. If `data` is train and val together
    (Data.unsplit), only test is held out and every split passes. Checkpoints without a record pass.

    Raises:
        LeakageError: Names the first such checkpoint; not raised if `allow`.
    """
    if allow or data.record["val"] == 0:
        return
    for checkpoint in checkpoints:
        fitted: DataRecord | None = checkpoint.provenance.get("data")
        if not fitted or fitted.get("digest") != data.record["digest"]:
            continue
        if fitted["split_digest"] != data.record["split_digest"]:
            raise LeakageError(
                f"{checkpoint.name}: was trained on another split of {fitted['name']} "
                f"(seed {fitted['seed']}) than this one (seed {data.record['seed']}), so no "
                f"sample is fresh to all ingredients. Use ingredients of one split, {_OR_ALLOW}"
            )
