"""Natural shift: clean accuracy on corrupted copies of the test set."""

from collections.abc import Callable
from dataclasses import replace

import torch

from robustsoup.data.corruptions import SEVERITIES, Corruptions
from robustsoup.evaluation.intervals import Accuracy
from robustsoup.evaluation.request import CheckedRequest
from robustsoup.evaluation.sharing import predict_shared
from robustsoup.evaluation.verdicts import Record


def measure_shift(
    request: CheckedRequest, corruptions: Corruptions, report: Callable[[int], None]
) -> Record:
    """Return the accuracies of a network on corrupted samples, ready for JSON.

    The copies of one image are right and wrong together, so they do not count as samples of their
    own: "right" has one verdict per image, whose sum is the mean over the copies.

    Args:
        request: The network, in eval mode, and the samples that it is evaluated on.
        corruptions: Corrupted copies; the first images of each severity are evaluated.
        report: Called with the number of copies that are done.

    Returns:
        "folder"; its "digest"; "part"; "samples", the number of images; "corruptions", the accuracy
        at each severity by name; "right", "1" or "0" for each image; "accuracy", the share of "1".
    """
    count = corruptions.count_images(request.data)
    protocol: Record = {
        "folder": str(corruptions.folder),
        "digest": corruptions.digest,
        "part": corruptions.part,
        "samples": count,
    }
    after = request.reuse.after
    earlier: Record = {} if after is None else after.record.get("shift", {})
    if all(earlier.get(key) == value for key, value in protocol.items()):
        return earlier
    by_corruption: dict[str, list[float]] = {}
    hits = torch.zeros(count, dtype=torch.int64)
    for name, split in corruptions.splits(request.data):
        shifted = replace(request, data=split)
        logits = predict_shared(
            request.model, shifted.fetch, len(split), request.pass_size, request.device
        )
        correct = (logits.argmax(1) == split.labels).view(SEVERITIES, -1)
        by_corruption[name] = correct.float().mean(1).tolist()
        hits += correct.sum(0)
        report(len(by_corruption) * SEVERITIES * count)
    right = round_shares(hits, SEVERITIES * len(by_corruption)).tolist()
    return {
        **protocol,
        "corruptions": by_corruption,
        "right": "".join("01"[verdict] for verdict in right),
        "accuracy": Accuracy(sum(right), count).to_json(),
    }


def round_shares(hits: torch.Tensor, copies: int) -> torch.Tensor:
    """Round the share of right copies of each image to one verdict, 0 or 1.

    The first k verdicts sum to the rounded sum of the first k shares, for every k. A verdict varies
    at least as much as the share does, so intervals and bounds that count verdicts hold.

    Args:
        hits: (n,) int64, right copies of each image, in 0..copies.
        copies: Copies of an image.
    """
    sums = (2 * hits.cumsum(0) + copies) // (2 * copies)
    return sums.diff(prepend=torch.zeros_like(sums[:1]))
