"""Dropout draws by the seed of a run: whatever the caller drew, and after a kill."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from training_helpers import DATA, Killed, kill_at

import robustsoup as rs

SETTINGS = {"epochs": 2, "batch_size": 32, "lr": 0.1, "device": "cpu", "precision": "float32"}


class Noise(nn.Module):
    """Draws from the generators of Python and NumPy."""

    def forward(self, x):
        return x * (1 + random.random() + np.random.random()) if self.training else x


def dropping(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Dropout(0.5), Noise(), nn.Linear(16, 10)
        )


def run_train(**changes):
    return rs.train(dropping(), DATA, threat="Linf 32/255", **SETTINGS, **changes).tensors


def run_subspace(**changes):
    ends = rs.train_subspace(dropping(), DATA, ["Linf 32/255", "clean"], **SETTINGS, **changes)
    return {f"{i} {name}": tensor for i in (0, 1) for name, tensor in ends[i].tensors.items()}


def run_learn(**changes):
    items = [rs.Checkpoint.of(dropping(seed)) for seed in (1, 2)]
    alpha = rs.learn(items, DATA, network=dropping(), threat="Linf 32/255", **SETTINGS, **changes)
    return {"alpha": alpha.alpha}


def equal(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("run", [run_train, run_subspace, run_learn])
def test_only_the_seed_decides_what_layers_draw(run, save_every_step, tmp_path):
    torch.manual_seed(1)
    expected = run()
    torch.manual_seed(2)
    with pytest.raises(Killed):
        run(state_path=tmp_path / "state.pt", on_progress=kill_at(2))
    torch.manual_seed(3)
    assert equal(run(state_path=tmp_path / "state.pt"), expected)
    assert not equal(run(seed=1), expected)
