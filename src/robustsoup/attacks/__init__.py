"""Attacks: functions of (model, x, y, threat) to x_adv."""

from robustsoup.attacks.apgd import AttackResult, apgd, apgd_train, run_apgd

ATTACKS = {"apgd": run_apgd}

__all__ = ["ATTACKS", "AttackResult", "apgd", "apgd_train", "run_apgd"]
