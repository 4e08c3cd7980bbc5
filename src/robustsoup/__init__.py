"""robustsoup: several adversarially fine-tuned checkpoints of one network into one, at the trade-off you need.

import robustsoup as rs
data = rs.load_data("cifar10")
soup = rs.mix(["eps4.safetensors", "eps16.safetensors"], [0.5, 0.5])
print(rs.evaluate(soup, data.test, ["Linf 8/255"]).accuracy)
"""

from robustsoup.attacks import apgd, apgd_train, pgd
from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.data import Data, Split, Synthetic, load_data
from robustsoup.diagnosis.landscape import Landscape, landscape
from robustsoup.diagnosis.rules import Soupability, check
from robustsoup.errors import RobustsoupError
from robustsoup.evaluation.comparison import Comparison, compare
from robustsoup.evaluation.evaluate import evaluate
from robustsoup.evaluation.intervals import Accuracy
from robustsoup.evaluation.verdicts import Evaluation
from robustsoup.models import load_model
from robustsoup.soups.coefficients import Coefficients, Dial
from robustsoup.soups.learning import learn, learn_dial
from robustsoup.soups.mixing import mix
from robustsoup.soups.search import search
from robustsoup.soups.selection import Candidate, Selection, pareto_front, select
from robustsoup.threats import ThreatModel
from robustsoup.training.objectives import Objective
from robustsoup.training.train import train

__all__ = [
    "Accuracy",
    "Candidate",
    "Checkpoint",
    "Coefficients",
    "Comparison",
    "Data",
    "Dial",
    "Evaluation",
    "Landscape",
    "Objective",
    "RobustsoupError",
    "Selection",
    "Soupability",
    "Split",
    "Synthetic",
    "ThreatModel",
    "apgd",
    "apgd_train",
    "check",
    "compare",
    "evaluate",
    "landscape",
    "learn",
    "learn_dial",
    "load_data",
    "load_model",
    "mix",
    "pareto_front",
    "pgd",
    "search",
    "select",
    "train",
]
