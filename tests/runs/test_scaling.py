"""Predictions for many devices: the simulation of a plan, and what a network costs."""

import pytest
import torch
from tiny_runs import DATA, MODEL, plan_of

from robustsoup.runs.context import Context
from robustsoup.runs.scaling import RATES, count_network, exchanged_bytes, predict, simulate

PLAN = plan_of()
SECONDS = {step.key: float(number % 5 + 1) for number, step in enumerate(PLAN.steps)}
CONTEXT = Context(DATA, MODEL, torch.device("cpu"))


def longest_chain():
    """Return the seconds of the longest chain of steps that read one another."""
    ends = {}
    for step in PLAN.steps:
        before = [ends[key] for key in step.inputs if key in ends]
        ends[step.key] = max(before, default=0.0) + SECONDS[step.key]
    return max(ends.values())


def test_one_device_takes_the_sum_and_many_the_longest_chain():
    assert simulate(PLAN.steps, SECONDS, 1).seconds == pytest.approx(sum(SECONDS.values()))
    assert simulate(PLAN.steps, SECONDS, 1).efficiency == pytest.approx(1)
    assert simulate(PLAN.steps, SECONDS, 500).seconds == pytest.approx(longest_chain())


@pytest.mark.parametrize("devices", [2, 3, 7])
def test_a_simulation_lies_between_the_bounds_of_list_scheduling(devices):
    run = simulate(PLAN.steps, SECONDS, devices)
    total = sum(SECONDS.values())
    assert run.seconds >= max(total / devices, longest_chain()) - 1e-9
    assert run.seconds <= total / devices + longest_chain() + 1e-9
    assert 0 < run.efficiency <= 1


def test_losses_cost_time_and_repeat_with_the_seed():
    without = simulate(PLAN.steps, SECONDS, 2)
    runs = [simulate(PLAN.steps, SECONDS, 2, losses_per_hour=600, seed=1) for _ in range(2)]
    assert runs[0] == runs[1]
    assert runs[0].lost > 0
    assert runs[0].busy == without.busy
    assert runs[0].seconds > without.seconds


def test_a_network_is_counted_by_its_layers():
    cost, network = count_network(CONTEXT), CONTEXT.fresh_network(0)
    state = network.state_dict().values()
    assert cost.weight_bytes == sum(tensor.nbytes for tensor in state)
    shapes = {}
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            module.register_forward_hook(lambda m, _, out: shapes.__setitem__(m, out.shape[2:]))
    network.eval()(torch.zeros(1, 1, 8, 8))
    expected = sum(2 * module.weight.numel() * size.numel() for module, size in shapes.items())
    assert cost.operations == expected
    assert cost.activation_bytes > 0


def test_a_subspace_exchanges_the_gradients_of_one_network():
    subspace = {"threats": ["Linf 64/255", "Linf 16/255"], "epochs": 3, "batch_size": 10**6}
    (step,) = (s for s in plan_of((("subspace",), subspace)).steps if s.kind == "subspace")
    cost = count_network(CONTEXT)
    # A batch larger than the data is one step of an epoch.
    assert exchanged_bytes(step, CONTEXT, cost) == 3 * cost.weight_bytes


def test_a_calculation_needs_no_such_device():
    few, many = (predict(PLAN.steps, CONTEXT, devices, RATES["h100"]) for devices in (1, 8))
    assert few.seconds == many.seconds
    assert many.simulation.seconds <= few.simulation.seconds
    assert few.source.startswith("calculated from ")
    assert 600 * (few.pieces - 1) < few.simulation.seconds <= 600 * few.pieces
    assert few.written > 0
    assert few.read > 0
    # Pre-training exchanges each weight in each of its steps.
    assert few.exchanged > count_network(CONTEXT).weight_bytes
