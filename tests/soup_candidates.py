"""Candidates with given accuracies, for the tests that choose among soups."""

import torch

from robustsoup.evaluation.verdicts import Evaluation, Verdicts
from robustsoup.soups.selection import Candidate

N = 200
LINF, L2 = "Linf 8/255", "L2 0.5"


def candidate(name, clean, robust=0, second=None, **record):
    """Return a soup that is right on the first `clean` of 200 samples, under attack on `robust`.

    With `second` the evaluation has a second threat, under which so many samples are right.
    """
    hits = {LINF: robust} if second is None else {LINF: robust, L2: second}
    threats = {
        threat: Verdicts(
            torch.arange(N) < count, *torch.zeros(2, N, dtype=torch.long), *torch.zeros(2, N)
        )
        for threat, count in hits.items()
    }
    labels = torch.zeros(N, dtype=torch.long)
    prediction = (torch.arange(N) >= clean).long()
    evaluation = Evaluation(torch.arange(N), labels, prediction, torch.zeros(N), threats, record)
    return Candidate(name, (1.0,), evaluation)
