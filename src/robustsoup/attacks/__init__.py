"""Attacks: functions of (model, x, y, threat) that return x_adv."""

from robustsoup.attacks.apgd import apgd, apgd_train, pgd
from robustsoup.attacks.attempts import AttackResult, run_attack
from robustsoup.attacks.square import square

__all__ = ["AttackResult", "apgd", "apgd_train", "pgd", "run_attack", "square"]
