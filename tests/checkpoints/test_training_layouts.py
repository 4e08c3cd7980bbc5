"""Files and folders as training scripts of other libraries leave them."""

from argparse import Namespace
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.errors import CheckpointError


def make_network():
    return nn.ModuleDict({"conv": nn.Conv2d(1, 2, 3), "norm": nn.BatchNorm2d(2)})


STATE = make_network().state_dict()
EMA = {name: 2 * tensor for name, tensor in STATE.items()}


def below(prefix, state=STATE):
    return {prefix + name: tensor for name, tensor in state.items()}


LAYOUTS = {
    "lightning": {
        "pytorch-lightning_version": "2.4.0",
        "state_dict": below("model._orig_mod.") | {"criterion.weight": torch.ones(3)},
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.5)}},
        "hyper_parameters": Namespace(lr=0.1),
    },
    "ddp and ema": {
        "model": below("module."),
        "ema": below("module.", EMA) | {"n_averaged": torch.tensor(5)},
        "best": np.float64(0.5),
    },
    "timm": {"arch": "x", "state_dict": OrderedDict(STATE), "state_dict_ema": OrderedDict(EMA)},
    "robustbench": {
        "state_dict": below("module.model.") | {"module.normalize.mean": torch.zeros(1)}
    },
    "compiled part": below("0._orig_mod."),
    "fsdp": below("_fsdp_wrapped_module.module."),
}
LARGER = below("more.") | EMA
"""Another network, such as a discriminator; larger than the network itself."""
LAYOUTS |= {
    "nested average": {"model_ema": {"state_dict": EMA}, "model": STATE},
    "nested discriminator": {"discriminator": {"state_dict": LARGER}, "net": STATE},
    "both nested": {"D": {"model": LARGER}, "G": {"state_dict": STATE}},
    "tensors outside": {"mean": torch.zeros(1000), "run": {"state_dict": STATE}},
    "average alone": {"ema": {"state_dict": STATE}, "queue": {"images": torch.zeros(1000)}},
    "average by a known key": {"model_state": EMA, "ema_state_dict": STATE},
}
NOTES = {
    "lightning": "set aside criterion.weight",
    "ddp and ema": "read model; ema is complete too (--key ema)",
    "timm": "state_dict_ema is complete too",
    "robustbench": "set aside module.normalize.mean",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_weights_of_a_training_script_are_found(layout, tmp_path):
    torch.save(LAYOUTS[layout], tmp_path / "saved.ckpt")
    network = make_network()
    loaded = Checkpoint.load(tmp_path / "saved.ckpt")
    loaded.load_into(network)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, STATE[name])
    assert NOTES.get(layout, "") in " ".join(loaded.with_names_of(network).notes)


def test_folders_of_trainers(tmp_path):
    trainer = tmp_path / "checkpoint-500"
    trainer.mkdir()
    for name in ("optimizer.bin", "scheduler.pt", "random_states_0.pkl"):
        torch.save({}, trainer / name)
    torch.save(STATE, trainer / "pytorch_model.bin")
    assert Checkpoint.load(trainer).digest == Checkpoint(STATE).digest
    pieces = tmp_path / "distributed"
    pieces.mkdir()
    (pieces / "__0_0.distcp").write_bytes(b"one of many")
    with pytest.raises(CheckpointError, match="distributed: got a folder that holds no checkpoint"):
        Checkpoint.load(pieces)
