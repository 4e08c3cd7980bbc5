"""The commands that load, judge and publish the chosen soup."""

import json
import shlex
from collections.abc import Mapping
from typing import Any

from robustsoup.models import NetworkSettings, is_built_in
from robustsoup.reports.file_names import hide_folders
from robustsoup.runs.results import EvaluationProtocol, Results


def list_commands(
    results: Results, recorded: Mapping[str, Any] | None = None
) -> list[tuple[str, str]]:
    """List (what it does, command) for the chosen soup; none without a soup.

    The seed is that of the recipe, which divides the data; `evaluate` takes no other one for the
    attack.

    Args:
        results: The results of the run.
        recorded: The network that the run recorded of the soup.
    """
    soup = results.soup
    if soup is None:
        return []
    arguments, options = name_network(soup, _find_network(results, recorded))
    load = f"rs.Checkpoint.load({json.dumps(soup)}).network({arguments})"
    data = hide_folders(str(results.data.get("name") or "DATA"))
    words = ["robustsoup", "evaluate", soup, "--data", data]
    for name in ("seed", "image_size", "channels"):
        if value := results.recipe.get(name):
            words += [f"--{name.replace('_', '-')}", str(value)]
    words += options
    protocol = results.protocol
    for threat in protocol.threats:
        words += ["--threat", threat]
    if protocol.report_on != "test":
        words += ["--split", protocol.report_on]
    if samples := protocol.samples.get(protocol.report_on):
        words += ["--samples", str(samples)]
    words += _attack_options(protocol, results.recipe.get("evaluate") or {})
    return [
        ("Load", f"import robustsoup as rs\n\nnetwork = {load}"),
        ("Judge", shlex.join(words)),
        ("Publish", shlex.join(["robustsoup", "push", soup, "hf://ORGANISATION/NAME"])),
    ]


def _find_network(results: Results, recorded: Mapping[str, Any] | None) -> NetworkSettings | None:
    """Return the network of the soup: what is recorded, else what the recipe says."""
    if recorded is not None:
        return NetworkSettings.from_record(recorded)
    if results.model is None:
        return None
    classes = results.data.get("classes")
    record = {
        "spec": results.model,
        "classes": len(classes) if isinstance(classes, list) else classes,
        "channels": results.data.get("channels"),
        "normalize": results.recipe.get("normalize"),
    }
    return NetworkSettings.from_record({name: item for name, item in record.items() if item})


def name_network(soup: str, network: NetworkSettings | None) -> tuple[str, list[str]]:
    """Return what names the network in Python and on the command line, if the file does not."""
    has_record = soup.endswith(".safetensors")
    if network is None or (has_record and is_built_in(network.spec)):
        return "", []
    arguments, options = json.dumps(network.spec), ["--model", network.spec]
    if has_record:
        return arguments, options
    arguments += f", classes={network.classes}, channels={network.channels}"
    if network.normalize:
        arguments += f", normalize={network.normalize}"
        options += ["--normalize", *(",".join(map(repr, part)) for part in network.normalize)]
    return arguments, options


def _attack_options(protocol: EvaluationProtocol, evaluate: Mapping[str, Any]) -> list[str]:
    """Return the options of `evaluate` that run the attack of the protocol.

    Args:
        protocol: The protocol.
        evaluate: The table of the recipe, which has what the protocol does not describe.
    """
    words: list[str] = []
    if protocol.attack != "apgd":
        words += ["--attack", protocol.attack]
    if protocol.attack in ("apgd", "pgd") and protocol.loss != "ce":
        words += ["--loss", protocol.loss]
    if protocol.steps:
        words += ["--n-queries" if protocol.attack == "square" else "--steps", str(protocol.steps)]
    if protocol.attack == "strong" and (queries := evaluate.get("n_queries")):
        words += ["--n-queries", str(queries)]
    if targets := evaluate.get("targets"):
        words += ["--targets", str(targets)]
    if (passes := evaluate.get("eot", 1)) != 1:
        words += ["--eot", str(passes)]
    if protocol.search_precision != "float32":
        words += ["--precision", protocol.search_precision]
    if protocol.restarts > 1:
        words += ["--restarts", str(protocol.restarts)]
    return words
