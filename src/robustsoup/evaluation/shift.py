"""Natural shift: clean accuracy on corrupted copies of the test set."""

from dataclasses import replace

from robustsoup.attacks.forward import predict_logits
from robustsoup.data import Samples
from robustsoup.data.corruptions import SEVERITIES, Corruptions
from robustsoup.data.splits import content_digest
from robustsoup.evaluation.intervals import Accuracy
from robustsoup.evaluation.request import CheckedRequest
from robustsoup.evaluation.verdicts import Record


def measure_shift(request: CheckedRequest, corruptions: Corruptions) -> Record:
    """Return the accuracies of a network on corrupted samples, ready for JSON.

    Args:
        request: The network, in eval mode, and the samples that it is evaluated on.
        corruptions: Corrupted copies; the first samples of each severity are evaluated.

    Returns:
        "folder"; "digest", over the samples; "corruptions", the accuracy at each severity by name;
        "accuracy", over all of them.
    """
    by_corruption: dict[str, list[float]] = {}
    digests: list[str] = []
    hits = total = 0
    for name, split in corruptions.splits(request.data):
        shifted = replace(request, data=split)
        logits = predict_logits(
            request.model, shifted.fetch, len(split), request.pass_size, request.device
        )
        correct = (logits.argmax(1) == split.labels).view(SEVERITIES, -1)
        by_corruption[name] = correct.float().mean(1).tolist()
        hits, total = hits + int(correct.sum()), total + correct.numel()
        digests.append(content_digest(Samples(split.images, split.labels, split.ids)))
    return {
        "folder": str(corruptions.folder),
        "digests": digests,
        "corruptions": by_corruption,
        "accuracy": Accuracy(hits, total).to_json(),
    }
