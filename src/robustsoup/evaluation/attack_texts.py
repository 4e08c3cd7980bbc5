"""The attack of an evaluation in words."""

from collections.abc import Mapping
from typing import Any


def describe_attack(record: Mapping[str, Any]) -> str:
    """Return the attack of an evaluation as a part of a sentence; "no attack" if there was none.

    Args:
        record: The record of an evaluation; entries that are missing are left out.
    """
    attack = str(record.get("attack", "an attack that is not recorded"))
    if not record.get("threats"):
        return "no attack"
    if attack == "autoattack":
        return f"AutoAttack, {record.get('version', 'no version recorded')}"
    if "code" in record or "loss" not in record:
        return attack
    restarts = record.get("restarts", 1)
    ending = f"{restarts} restart{'' if restarts == 1 else 's'}, float32"
    name = f"{attack.upper()}-{str(record['loss']).upper()}"
    if attack == "square":
        return f"{name} {record.get('n_queries')} queries, {ending}"
    precision = record.get("search_precision", "float32")
    search = "" if precision == "float32" else f", search in {precision}"
    if attack in ("pma", "malt", "strong"):
        name = {"pma": "PMA", "malt": "MALT", "strong": "Strong (PMA, MALT, Square)"}[attack]
    tried = record.get("targets") if attack in ("malt", "strong") else None
    targets = "" if tried is None else f", {tried} target{'' if tried == 1 else 's'}"
    queries = f", {record['n_queries']} queries" if attack == "strong" else ""
    return f"{name} {record.get('steps')} steps{targets}{queries}, {ending}{search}"
