"""Attacks: functions of (model, x, y, threat) to x_adv."""

from robustsoup.attacks.apgd import apgd_train
from robustsoup.attacks.attack import AttackResult, Settings, apgd, pgd, run_attack

ATTACKS = ("apgd", "pgd", "autoattack")

__all__ = ["ATTACKS", "AttackResult", "Settings", "apgd", "apgd_train", "pgd", "run_attack"]
