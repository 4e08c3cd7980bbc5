"""Evaluations that ranks share, for tests: what a rank calls."""

import importlib.metadata
import os
from dataclasses import replace

import torch
from evaluated_networks import Counted, interrupt_at_gate

from robustsoup import distributed
from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.data import load_data
from robustsoup.evaluation import attackers
from robustsoup.evaluation.evaluate import evaluate

CHUNK = 16
"""Samples in one call of an attack of the user's, so that few samples make several chunks."""


def noisy_step(model, x, y, threat, *, seed):
    """Return x plus a random sign in each pixel: an attack whose points depend on the batch."""
    generator = torch.Generator().manual_seed(seed)
    return (x + threat.eps * torch.randn(x.shape, generator=generator).sign()).clamp(0, 1)


def evaluate_path(path, labels, threats, settings):
    """Evaluate a checkpoint on the first digits of test, with other labels."""
    attackers.CHUNK_SAMPLES = attackers.FunctionAttacker.together = CHUNK
    return evaluate(Checkpoint.load(path), _digits(labels), threats, **settings)


def evaluate_until(gate_after, path, labels, threats, settings):
    """Evaluate, and interrupt this rank after a number of its passes with a gradient."""
    Counted.reset(gate_after=gate_after)
    network = Counted(Checkpoint.load(path).network())
    return evaluate(network, _digits(labels), threats, on_progress=interrupt_at_gate, **settings)


def evaluate_counted(path, labels, threats, settings):
    """Evaluate, and return the evaluation and the passes with a gradient of this rank."""
    Counted.reset()
    network = Counted(Checkpoint.load(path).network())
    evaluation = evaluate(network, _digits(labels), threats, **settings)
    return evaluation, Counted.passes[True]


def evaluate_own(paths, labels, devices, threats):
    """Evaluate another checkpoint, on other samples or another device, in each rank."""
    rank = distributed.rank()
    distributed.describe_device = lambda _device: devices[rank]
    return evaluate_path(paths[rank], labels[rank], threats, {"steps": 2})


def start_as(versions):
    """Join the group as another version of robustsoup in each rank."""
    importlib.metadata.version = lambda _name: versions[int(os.environ["RANK"])]
    distributed.start()


start_as.joins = True


def _digits(labels):
    return replace(load_data("digits").test.first(len(labels)), labels=torch.tensor(labels))
