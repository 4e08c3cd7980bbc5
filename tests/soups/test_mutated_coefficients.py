"""Coefficients and dials that anybody wrote: mixed, or one line says why not."""

import json
import random

import pytest
import torch
from json_mutations import mutated_texts
from safetensors import safe_open
from safetensors.torch import save_file
from stored_files import save_coefficients, save_dial

from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.checkpoints.safetensors_files import RECORD_KEY
from robustsoup.errors import RobustsoupError
from robustsoup.soups.coefficients import load_coefficients
from robustsoup.soups.mixing import mix
from robustsoup.stamp import unstamp_record

CHANGES = {
    "missing": lambda tensor: None,
    "empty": lambda tensor: tensor[:0],
    "short": lambda tensor: tensor[:1],
    "flat": lambda tensor: tensor.flatten(),
    "scalar": lambda tensor: tensor.flatten()[0],
    "turned": lambda tensor: tensor.movedim(0, -1),
    "whole numbers": lambda tensor: tensor.long(),
    "complex": lambda tensor: tensor.to(torch.complex64),
    "half precision": lambda tensor: tensor.half(),
    "negative": lambda tensor: -tensor,
    "huge": lambda tensor: tensor.double() * 1e300,
    "not a number": lambda tensor: tensor * torch.nan,
}


def read_parts(path):
    """Return the tensors and the record of a file, as another program would write them."""
    with safe_open(path, "pt") as file:
        record = unstamp_record(json.loads(file.metadata()[RECORD_KEY]), path)
        return {name: file.get_tensor(name) for name in file.keys()}, record  # noqa: SIM118


def mutated_tensors(tensors, chance):
    """Return the tensors with one of them changed, missing or renamed."""
    name, (word, change) = chance.choice(list(tensors)), chance.choice(list(CHANGES.items()))
    changed = {key: tensor for key, tensor in tensors.items() if key != name}
    if word != "missing":
        changed[name] = change(tensors[name]).clone().contiguous()
    return changed


def read_and_mix(path, networks, at):
    """Do with the file what commands and notebooks do."""
    coefficients = load_coefficients(path, at)
    assert repr(coefficients).isprintable()
    assert coefficients._repr_html_()
    coefficients.entropy()
    coefficients.movement()
    coefficients.row("layer0.weight")
    return mix(networks, coefficients)


@pytest.mark.parametrize(("save", "at"), [(save_coefficients, None), (save_dial, 0.3)])
def test_mutated_coefficients_are_mixed_or_refused_in_one_line(tmp_path, save, at):
    path, chance, refusals, mixed = save(tmp_path), random.Random(0), [], 0
    tensors, record = read_parts(path)
    n = tensors["alpha" if at is None else "line"].shape[-1]
    names = record["layers"]
    statistics = {"bn.running_mean": torch.zeros(64)}
    networks = [
        Checkpoint({name: torch.full((2, 2), float(i)) for name in names} | statistics)
        for i in range(n)
    ]
    record["ingredients"] = [network.digest for network in networks]
    for number, text in enumerate(mutated_texts(record, 150)):
        changed = mutated_tensors(tensors, chance) if number % 3 == 0 else tensors
        whole = json.dumps(record) if number % 3 == 0 and number % 2 else text
        save_file(changed, path, {RECORD_KEY: whole})
        try:
            soup = read_and_mix(path, networks, at)
        except RobustsoupError as error:
            refusals.append(str(error))
        else:
            mixed += 1
            assert all(torch.isfinite(tensor).all() for tensor in soup.tensors.values())
    assert len(refusals) > 20
    assert mixed
    assert all(message.isprintable() for message in refusals)
