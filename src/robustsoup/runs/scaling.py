"""Predict what a plan takes on many devices: time, memory, and bytes that move and stay.

The time is that of a simulation: the steps of the plan go to devices in the order in which
`robustsoup.runs.execute` starts them, each for its estimated seconds. On this machine's device the
seconds come from one short measurement; for another device they are calculated from the network's
operations and the rate that robustsoup reached there.
"""

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from robustsoup.attacks.forward import pass_size, set_mode
from robustsoup.runs.context import Context
from robustsoup.runs.cost import estimate_bytes, estimate_seconds, measure_pass_seconds
from robustsoup.runs.plan import Step
from robustsoup.runs.tasks import (
    AttackExamples,
    DoPart,
    EvaluateNetwork,
    FittingTask,
    Key,
    LearnCoefficients,
    MapPlane,
    Task,
    TrainNetwork,
    TrainSubspace,
)
from robustsoup.seeding import keyed_generator

FLOAT32_BYTES = 4
STATES_OF_A_WEIGHT = 3
"""Training holds the weight, its gradient and its momentum."""
PIECE_SECONDS = 600
"""Seconds of a piece of a run on a machine that is lent for minutes (benchmarks/pieces.py)."""


@dataclass(frozen=True)
class DeviceRate:
    """What robustsoup reached on a kind of device, for calculations where there is none.

    Attributes:
        operations: Floating-point operations a second, by precision.
        memory: Bytes of memory.
        source: The measurement.
    """

    operations: Mapping[str, float]
    memory: int
    source: str


RATES = {
    "h100": DeviceRate(
        {"float32": 23e12, "bfloat16": 73e12},
        80 * 10**9,
        "steps of training of resnet18 at batch 128 (49.1 ms and 15.6 ms, docs/benchmarks.md)",
    )
}
"""Devices that `robustsoup plan --device` knows without having them."""


@dataclass(frozen=True)
class Simulation:
    """How a plan runs on some devices.

    Attributes:
        seconds: Seconds from the first start to the last end.
        busy: Seconds of all steps together, on one device each.
        lost: Seconds of work that was lost with devices.
        devices: Number of devices.
    """

    seconds: float
    busy: float
    lost: float
    devices: int

    @property
    def efficiency(self) -> float:
        """Share of the devices' time that the steps' work takes, in [0, 1]."""
        return self.busy / (self.seconds * self.devices) if self.seconds else 1.0


def simulate(
    steps: Sequence[Step],
    seconds: Mapping[Key, float],
    devices: int,
    *,
    overhead: float = 0.0,
    losses_per_hour: float = 0.0,
    saved_every: float = 30.0,
    seed: int = 0,
) -> Simulation:
    """Simulate a plan: each free device takes the first step whose inputs are finished.

    Args:
        steps: The steps that must run, in the order of the plan.
        seconds: Seconds of each step, by key.
        devices: Number of devices, at least 1.
        overhead: Seconds that a step takes beside its work, to start and to load its inputs.
        losses_per_hour: How often one device is lost in an hour of work, at random; its step goes
            on from its last saved state.
        saved_every: Seconds between two saved states: what is lost is half of it on average.
        seed: Seed of the losses.
    """
    generator = keyed_generator("losses", seed)
    waiting = {step.key: step for step in steps}
    unfinished, running = set(waiting), list[tuple[float, int, Key]]()
    now, lost, started = 0.0, 0.0, 0
    while unfinished:
        for step in [s for s in waiting.values() if unfinished.isdisjoint(s.inputs)]:
            if len(running) == devices:
                break
            del waiting[step.key]
            work = seconds[step.key]
            expected = torch.tensor(losses_per_hour * work / 3600)
            losses = int(torch.poisson(expected, generator=generator))
            again = losses * (min(saved_every, work) / 2 + overhead)
            lost += again
            started += 1
            heapq.heappush(running, (now + overhead + work + again, started, step.key))
        now, _, key = heapq.heappop(running)
        unfinished.remove(key)
    return Simulation(now, sum(seconds[step.key] for step in steps), lost, devices)


@dataclass(frozen=True)
class NetworkCost:
    """What one image costs in a network.

    Attributes:
        operations: Floating-point operations of one forward pass.
        activation_bytes: Bytes that a forward pass keeps for its backward pass, in float32.
        weight_bytes: Bytes of the weights and buffers.
    """

    operations: float
    activation_bytes: float
    weight_bytes: int


def count_network(context: Context) -> NetworkCost:
    """Count the operations and bytes of the recipe's network, by one pass of two images."""
    from torch.utils.flop_counter import FlopCounterMode

    network, images = context.fresh_network(0), 2
    set_mode(network, training=False)
    bytes_by_storage: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        bytes_by_storage[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = torch.zeros(images, context.data.record["channels"], *context.data.record["size"])
    with (
        FlopCounterMode(display=False) as counter,
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        network(x.requires_grad_())
    weights = {t.untyped_storage().data_ptr() for t in network.parameters()}
    activations = sum(size for place, size in bytes_by_storage.items() if place not in weights)
    held = sum(tensor.nbytes for tensor in network.state_dict().values())
    return NetworkCost(counter.get_total_flops() / images, activations / images, held)


@dataclass(frozen=True)
class Prediction:
    """What the steps of a plan take on some devices.

    Attributes:
        simulation: Their time.
        seconds: Seconds of each step, by key.
        memory: Bytes that the largest step needs on a device.
        read: Bytes of checkpoints that workers read from the store.
        written: Bytes that steps add to the store.
        exchanged: Bytes that each process of `torchrun` would exchange in training and learning.
        source: Where the seconds come from.
    """

    simulation: Simulation
    seconds: dict[Key, float]
    memory: int
    read: int
    written: int
    exchanged: int
    source: str

    @property
    def pieces(self) -> int:
        """Number of pieces of ten minutes that the run takes, one after another."""
        return math.ceil(self.simulation.seconds / PIECE_SECONDS)

    def as_record(self) -> dict[str, Any]:
        """Return the prediction ready for JSON, without the steps."""
        return {
            "devices": self.simulation.devices,
            "seconds": round(self.simulation.seconds, 2),
            "device_seconds": round(self.simulation.busy, 2),
            "pieces": self.pieces,
            "efficiency": round(self.simulation.efficiency, 4),
            "memory_bytes": self.memory,
            "read_bytes": self.read,
            "written_bytes": self.written,
            "exchanged_bytes": self.exchanged,
            "source": self.source,
        }


def predict(
    steps: Sequence[Step], context: Context, devices: int, rate: DeviceRate | None = None
) -> Prediction:
    """Predict what steps take.

    Args:
        steps: The steps that must run, in the order of the plan.
        context: Data, network and device.
        devices: Number of devices.
        rate: The devices; None for those that are like that of the context.
    """
    cost = count_network(context)

    def calculate(_context: Context, precision: str) -> float:
        assert rate is not None
        return cost.operations / rate.operations[precision]

    measure = measure_pass_seconds if rate is None else calculate
    seconds = estimate_seconds(steps, context, measure)
    measured = f"measured on this {context.device.type}"
    return Prediction(
        simulate(steps, seconds, devices),
        seconds,
        estimate_memory(steps, cost, torch.device("cuda") if rate else context.device),
        count_moved_bytes(steps, cost),
        estimate_bytes(steps, context),
        sum(exchanged_bytes(step, context, cost) for step in steps),
        measured if rate is None else f"calculated from {rate.source}",
    )


def estimate_memory(steps: Sequence[Step], cost: NetworkCost, device: torch.device) -> int:
    """Return the bytes that the largest step needs on a device, roughly.

    A step that trains holds its weights three times and the activations of one part of a batch; in
    learning, the ingredients are counted too, which may lie elsewhere (`ingredients_on`). A step
    that attacks holds its weights twice and the activations of one pass.
    """
    return round(max((_step_memory(step.task, cost, device) for step in steps), default=0))


def _step_memory(task: Task, cost: NetworkCost, device: torch.device) -> float:
    task = task.whole if isinstance(task, DoPart) else task
    images, precision, copies = 0, "float32", 2
    if isinstance(task, FittingTask):
        settings = task.settings
        images, precision = -(-settings.batch_size // settings.accumulate), settings.precision
        copies = STATES_OF_A_WEIGHT * max(getattr(task, "checkpoints", 1), 1)
        if isinstance(task, LearnCoefficients):
            copies = 2 + len(task.ingredients)
    elif isinstance(task, EvaluateNetwork | AttackExamples):
        attack = task.settings.attack
        images, precision = pass_size(device, attack.batch_size), attack.precision
    elif isinstance(task, MapPlane):
        images, precision = pass_size(device), task.settings.precision
    size = FLOAT32_BYTES if precision == "float32" else FLOAT32_BYTES // 2
    return copies * cost.weight_bytes + images * cost.activation_bytes * size / FLOAT32_BYTES


def count_moved_bytes(steps: Sequence[Step], cost: NetworkCost) -> int:
    """Return the bytes of the checkpoints that steps read from the store, each for itself."""
    return sum(_count_checkpoints(step) * cost.weight_bytes for step in steps)


def _count_checkpoints(step: Step) -> int:
    task = step.task
    if step.kind in ("evaluate", "examples"):
        return 1
    if step.kind in ("mix", "merge", "learn", "dial", "greedy", "clean"):
        return len(getattr(task, "ingredients", ()))
    return len(step.parents)


def exchanged_bytes(step: Step, context: Context, cost: NetworkCost) -> int:
    """Return the bytes that each process of `torchrun` exchanges for a step of training.

    Training sums the gradient of each weight; learning that of each active coefficient, 8 bytes.
    """
    task = step.task
    if not isinstance(task, TrainNetwork | TrainSubspace | LearnCoefficients):
        return 0
    batches = max(len(context.data.train) // task.settings.batch_size, 1) * task.settings.epochs
    if not isinstance(task, LearnCoefficients):
        return batches * cost.weight_bytes
    layers = len(list(context.fresh_network(0).parameters()))
    return round(batches * (1 - task.settings.detach) * layers * len(task.ingredients) * 8)
