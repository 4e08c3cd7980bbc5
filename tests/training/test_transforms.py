"""Saved states belong to the split and its augmentation that they were saved for."""

from dataclasses import replace

import pytest
from learning_helpers import learn_digits, resnet_ingredients
from training_helpers import DATA, LINF, fresh_network, train_digits

from robustsoup.data import Augmentation
from robustsoup.errors import CheckpointError
from robustsoup.soups.subspace import train_subspace
from robustsoup.training.transforms import augmentation_fingerprint

OWN = replace(DATA, record={**DATA.record, "name": "my_data:load"})


def padded(data):
    """Return the data with an augmentation of its training images."""
    return replace(data, augmentation=Augmentation(pad=1))


def _train(data, path):
    train_digits(data=data, epochs=1, state_path=path)


def _learn(data, path):
    learn_digits(resnet_ingredients(2), data=data, epochs=1, state_path=path)


def _train_subspace(data, path):
    ends = (LINF, "Linf 8/255")
    train_subspace(fresh_network(), data, ends, epochs=1, device="cpu", state_path=path)


@pytest.mark.parametrize("work", [_train, _learn, _train_subspace])
def test_a_state_of_a_users_data_with_another_augmentation_or_split_is_refused(tmp_path, work):
    work(OWN, tmp_path / "state.pt")
    for other in (padded(OWN), replace(OWN, name="val")):
        with pytest.raises(CheckpointError, match="other settings"):
            work(other, tmp_path / "state.pt")


def test_built_in_data_has_the_fingerprint_of_its_digest_alone():
    assert augmentation_fingerprint(DATA) == augmentation_fingerprint(padded(DATA)) == []
