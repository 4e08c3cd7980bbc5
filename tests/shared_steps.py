"""Steps of training and learning that ranks share, for tests: what a rank calls."""

import itertools
import os
import signal

import torch
from learning_helpers import NetworkWithoutNorm, SmallNetwork, small_ingredients
from torch import nn
from training_helpers import DATA, LINF, fresh_network

from robustsoup import distributed
from robustsoup.interruption import handled_signals
from robustsoup.settings import LearnSettings, TrainSettings
from robustsoup.soups.layer_weights import Softmax
from robustsoup.soups.learning_run import LearningInputs, LearningRun
from robustsoup.soups.subspace import SubspaceRun, draw_point, train_subspace
from robustsoup.threats import ThreatModel
from robustsoup.training import adversarial_loss
from robustsoup.training.objectives import Objective
from robustsoup.training.sharing import BatchShare, synchronised_batchnorm
from robustsoup.training.train import TrainingInputs, TrainingRun, train

CPU = torch.device("cpu")
ENDS = (LINF, ThreatModel("Linf", 8 / 255))
IMAGES = 32
"""Images of a step: an uneven number for each of 3 ranks."""


def _invert(_model, batch, *_arguments, **_settings):
    """Return the images inverted: an attacked batch that is given, not searched."""
    return 1 - batch[0]


def take_training_step(objective, batchnorm, accumulate=None):
    """Take one step; return the loss, the gradients and the network's tensors, float64.

    With a number of parts to accumulate, the network has no BatchNorm.
    """
    torch.manual_seed(0)
    settings = TrainSettings(
        threat=LINF,
        batch_size=IMAGES,
        objective=Objective.parse(objective),
        precision="float32",
        batchnorm=batchnorm,
        accumulate=accumulate or 1,
    )
    adversarial_loss.attack_batch = _invert
    network = NetworkWithoutNorm() if accumulate else SmallNetwork()
    run = TrainingRun(network, TrainingInputs(DATA, None, None, settings))
    x, y, _ = next(run.batches(0, 0))
    before = distributed.exchanged_bytes()
    loss = run.take_step(x, y)
    grads = {name: parameter.grad for name, parameter in run.model.named_parameters()}
    return loss, grads, run.model.state_dict(), distributed.exchanged_bytes() - before


def take_subspace_step(objective, batchnorm):
    """Take one step amid a line; return the loss, its gradients and the tensors of the ends."""
    torch.manual_seed(0)
    settings = TrainSettings(
        threat=LINF,
        batch_size=IMAGES,
        objective=Objective.parse(objective),
        precision="float32",
        batchnorm=batchnorm,
    )
    adversarial_loss.attack_batch = _invert
    inputs = TrainingInputs(DATA, None, None, settings)
    run = SubspaceRun(SmallNetwork(), inputs, ENDS, "eps")
    points = ((step, draw_point(2, settings.seed, step)[0]) for step in itertools.count())
    run.step = next(step for step, weight in points if 0 < weight < 1)
    x, y, _ = next(run.batches(0, 0))
    before = distributed.exchanged_bytes()
    loss = run.take_step(x, y)
    counted = distributed.exchanged_bytes() - before
    grads = {name: parameter.grad for name, parameter in run.model.named_parameters()}
    return loss, grads, nn.ModuleList(run.ends).state_dict(), counted


def take_learning_step(objective, batchnorm, accumulate=None):
    """Take one step; return the loss, the gradient of the coefficients and the statistics.

    With a number of parts to accumulate, the network has no BatchNorm.
    """
    network, ingredients = small_ingredients(
        kind=NetworkWithoutNorm if accumulate else SmallNetwork
    )
    settings = LearnSettings(
        threat=LINF,
        batch_size=IMAGES,
        objective=Objective.parse(objective),
        precision="float32",
        detach=0.0,
        batchnorm=batchnorm,
        accumulate=accumulate or 1,
    )
    by_alpha = []

    def gradient(self, gradient, alpha):
        by_alpha.append(gradient)
        return original(self, gradient, alpha)

    original, Softmax.gradient = Softmax.gradient, gradient
    adversarial_loss.attack_batch = _invert
    try:
        inputs = LearningInputs(ingredients, DATA, None, network, None, "memory", CPU)
        run = LearningRun(inputs, settings)
        x, y, _ = next(run.batches(0, 0))
        before = distributed.exchanged_bytes()
        loss = run.take_step(x, y)
    finally:
        Softmax.gradient = original
    counted = distributed.exchanged_bytes() - before
    return loss, {"alpha": by_alpha[0]}, dict(run.model.named_buffers()), counted


def train_until(step, train_in, place):
    """Train by `train_shared` or `train_line`; rank 1 receives SIGTERM after a step."""

    def terminate(done, _total, _figures):
        if done == step and distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with handled_signals(restore=True):
        return train_in(place, terminate)


def train_shared(path, on_progress=None):
    """Train a small network for two epochs of three steps; return the checkpoint's record."""
    trained = train(
        fresh_network(),
        DATA,
        threat=LINF,
        epochs=2,
        batch_size=IMAGES,
        precision="float32",
        device="cpu",
        state_path=path,
        on_progress=on_progress,
    )
    return trained.provenance


def train_line(folder, on_progress=None):
    """Train a line for two epochs of three steps, each rank with a file of its own.

    Returns the record of an end.
    """
    ends = train_subspace(
        fresh_network(),
        DATA,
        ENDS,
        epochs=2,
        batch_size=IMAGES,
        precision="float32",
        device="cpu",
        state_path=folder / f"{distributed.rank()}.pt",
        on_progress=on_progress,
    )
    return ends[0].provenance


NORM_LAYERS = (
    nn.BatchNorm2d(3),
    nn.BatchNorm2d(3, affine=False),
    nn.BatchNorm2d(3, momentum=None),
    nn.BatchNorm2d(3, track_running_stats=False),
    nn.BatchNorm1d(3, eps=0.1, momentum=0.5),
)


def normalise_in_sync():
    """Return outputs, gradients by the inputs, and buffers of each layer after two passes."""
    generator, share, results = torch.Generator().manual_seed(0), BatchShare.of(IMAGES), []
    for number, layer in enumerate(NORM_LAYERS):
        layer.double().train()
        shape = (2, IMAGES, 3, 5) if isinstance(layer, nn.BatchNorm1d) else (2, IMAGES, 3, 4, 5)
        passes = torch.randn(shape, generator=generator, dtype=torch.float64) * 3 + number
        weights = torch.randn(shape[1:], generator=generator, dtype=torch.float64)
        parts = [share.take(batch).requires_grad_() for batch in passes]
        with synchronised_batchnorm(layer, "sync"):
            outputs = [layer(batch) for batch in parts]
            loss = sum((output * share.take(weights)).square().sum() for output in outputs)
            grads = torch.autograd.grad(loss, parts)
        results.append(([output.detach() for output in outputs], grads, layer.state_dict()))
    return results


def train_in_batches(images):
    """Train with a batch of a few images."""
    return train(fresh_network(), DATA, threat=LINF, epochs=1, batch_size=images, device="cpu")
