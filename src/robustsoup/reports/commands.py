"""The commands that load, judge and publish the chosen soup."""

import shlex

from robustsoup.reports.file_names import hide_folders
from robustsoup.runs.results import EvaluationProtocol, Results


def list_commands(results: Results) -> list[tuple[str, str]]:
    """List (what it does, command) for the chosen soup; none without a soup."""
    soup = results.soup
    if soup is None:
        return []
    protocol = results.protocol
    data = hide_folders(str(results.data.get("name") or "DATA"))
    words = ["robustsoup", "evaluate", soup, "--data", data]
    for threat in protocol.threats:
        words += ["--threat", threat]
    words += _attack_options(protocol)
    return [
        (
            "Load",
            f"import robustsoup as rs\n\nnetwork = rs.Checkpoint.load({soup!r}).network().eval()",
        ),
        ("Judge", shlex.join(words)),
        ("Publish", shlex.join(["robustsoup", "push", soup, "hf://ORGANISATION/NAME"])),
    ]


def _attack_options(protocol: EvaluationProtocol) -> list[str]:
    """Return the options of `evaluate` that run the attack of the protocol."""
    words: list[str] = []
    if protocol.attack != "apgd":
        words += ["--attack", protocol.attack]
    if protocol.attack in ("apgd", "pgd") and protocol.loss != "ce":
        words += ["--loss", protocol.loss]
    if protocol.steps:
        words += ["--n-queries" if protocol.attack == "square" else "--steps", str(protocol.steps)]
    if protocol.restarts > 1:
        words += ["--restarts", str(protocol.restarts)]
    return words
