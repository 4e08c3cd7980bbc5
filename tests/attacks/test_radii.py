"""Radii whose ball holds every image are refused by each function that attacks."""

import pytest
import torch

import robustsoup as rs
from robustsoup.errors import ThreatError
from robustsoup.soups.mixing import check_buffer_policy

SHAPE = (3, 1, 4, 4)


def attack_plainly(name, threat):
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 2))
    x, y = torch.full(SHAPE, 0.5), torch.zeros(3, dtype=torch.int64)
    options = {"n_queries": 2} if name == "square" else {"steps": 2}
    return getattr(rs, name)(model, x, y, threat, **options)


@pytest.mark.parametrize("name", ["apgd", "pgd", "apgd_train", "square"])
@pytest.mark.parametrize("threat", ["L2 4", "L1 16", "L2 1000"])
def test_plain_attacks_refuse_such_radii(name, threat):
    with pytest.raises(ThreatError, match=r"the ball holds every image of shape \(1, 4, 4\)"):
        attack_plainly(name, threat)


@pytest.mark.parametrize("name", ["apgd", "pgd", "apgd_train", "square"])
@pytest.mark.parametrize("threat", ["L2 3.9", "L1 15", "Linf 1", "clean"])
def test_plain_attacks_accept_smaller_radii_and_the_whole_box(name, threat):
    assert attack_plainly(name, threat).shape == SHAPE


def test_the_calibration_of_mix_refuses_such_radii():
    train = rs.load_data("digits").train
    threat = rs.ThreatModel.parse("L2 8")
    with pytest.raises(ThreatError, match="the ball holds every image"):
        check_buffer_policy("recalibrate-adversarial", train, threat)
    assert check_buffer_policy("average", train, threat).name == "average"
