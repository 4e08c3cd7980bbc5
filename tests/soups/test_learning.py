"""The learned soup: gradients equal autograd's, one network in the graph, kills, and records."""

import functools
import itertools
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from learning_helpers import (
    LAYERS,
    assert_same_coefficients,
    learn_digits,
    relative_error,
    resnet_ingredients,
    small_ingredients,
)
from torch.func import functional_call
from trained_seed import trained_seed
from training_helpers import DATA, LINF, STEPS_PER_EPOCH, Killed, interrupt_at, kill_at

from robustsoup.attacks import apgd_train
from robustsoup.attacks.losses import ce
from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.data import batches
from robustsoup.errors import (
    CheckpointError,
    Diverged,
    IngredientMismatch,
    ModelError,
    RequestError,
)
from robustsoup.models import load_model
from robustsoup.settings import LearnSettings
from robustsoup.soups import learning_run
from robustsoup.soups.coefficients import Coefficients
from robustsoup.soups.ingredients import Ingredients
from robustsoup.soups.layer_weights import Softmax
from robustsoup.soups.learning import learn
from robustsoup.soups.learning_run import initial_logits
from robustsoup.soups.mixing import mix
from robustsoup.threats import ThreatModel
from robustsoup.training.train import train


def start_alpha(n=3, init="xavier", seed=0):
    """Return the coefficients that learning starts from, columns by digest."""
    return torch.softmax(initial_logits(LAYERS, n, init, trained_seed(seed)).double(), 1)


# gradients


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 6), st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(0, 10**6)
)
def test_logits_gradient_equals_autograds(n, shape, seed):
    generator = torch.Generator().manual_seed(seed)
    thetas = torch.randn(n, *shape, generator=generator, dtype=torch.float64)
    grad = torch.randn(shape, generator=generator, dtype=torch.float64)
    logits = torch.randn(n, generator=generator, dtype=torch.float64, requires_grad=True)
    alpha = torch.softmax(logits, 0)
    mixed = torch.tensordot(alpha, thetas, 1)
    (expected,) = torch.autograd.grad(mixed, logits, grad)
    inner = torch.stack([(grad * theta).sum() for theta in thetas])
    got = Softmax().gradient(inner, alpha.detach())
    assert torch.allclose(got, expected, rtol=1e-10, atol=1e-12)


def test_coefficient_gradients_equal_autograds_with_all_networks_in_the_graph():
    net, items = small_ingredients()
    names = [name for name, _ in net.named_parameters()]
    x, y, _ = next(iter(batches(DATA, 32, seed=trained_seed(), epoch=0)))
    logits = initial_logits(len(names), 3, "xavier", trained_seed()).double().requires_grad_()
    alpha = torch.softmax(logits, 1)
    theta = {
        name: sum(a * item.tensors[name] for a, item in zip(alpha[i], items, strict=True))
        for i, name in enumerate(names)
    }
    loss = ce(functional_call(net.train(), theta, (x,)), y).mean()
    (expected,) = torch.autograd.grad(loss, logits)

    mix(items, dict(zip(names, alpha.tolist(), strict=True))).load_into(net)
    grads = torch.autograd.grad(ce(net.train()(x), y).mean(), list(net.parameters()))
    inner = Ingredients(items, names, torch.device("cpu"), "memory").inner(
        dict(zip(names, grads, strict=True))
    )
    got = Softmax().gradient(inner, alpha.detach())
    for i, name in enumerate(names):
        if name == "conv1.bias":  # BatchNorm removes it: rounding only
            assert got[i].abs().max() < 1e-12 > expected[i].abs().max()
        else:
            assert relative_error(got[i], expected[i]) < 1e-9, name


def sum_to_one(free):
    """Return the rows moved evenly so that each sums to 1, in the graph."""
    return free + (1 - free.sum(1, keepdim=True)) / free.shape[1]


def learn_by_autograd(net, items, steps, *, lr, momentum, objective, threat, affine=False):
    """Learn with weights and mixing in the graph, PyTorch's SGD and its cosine schedule."""
    names = [name for name, _ in net.named_parameters()]
    free = initial_logits(len(names), len(items), "xavier", trained_seed()).double()
    weigh = sum_to_one if affine else functools.partial(torch.softmax, dim=1)
    free = (torch.softmax(free, 1) if affine else free).requires_grad_()
    lr = lr / len(items) ** 2 if affine else lr
    optimizer = torch.optim.SGD([free], lr=lr, momentum=momentum)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    buffers = {name: tensor for name, tensor in items[0].tensors.items() if name not in names}
    buffers = {
        name: sum(item.tensors[name] for item in items) / len(items)
        if tensor.is_floating_point()
        else tensor.clone()
        for name, tensor in buffers.items()
    }
    for step in range(steps):
        epoch, number = divmod(step, STEPS_PER_EPOCH)
        x, y, _ = list(batches(DATA, 32, seed=trained_seed(), epoch=epoch))[number]
        alpha = weigh(free)
        theta = {
            n: sum(a * item.tensors[n] for a, item in zip(alpha[i], items, strict=True))
            for i, n in enumerate(names)
        }
        net.load_state_dict({n: t.detach() for n, t in {**theta, **buffers}.items()})
        x_adv = apgd_train(net, x, y, threat, steps=2)
        net.train()
        if objective == "ce":
            loss = ce(functional_call(net, {**theta, **buffers}, (x_adv,)), y).mean()
        else:
            losses = ce(
                functional_call(net, {**theta, **buffers}, (torch.cat([x, x_adv]),)),
                torch.cat([y, y]),
            )
            loss = 0.4 * losses[:32].mean() + 0.6 * losses[32:].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return weigh(free.detach()), buffers


@pytest.mark.parametrize(
    ("epochs", "objective", "threat", "affine"),
    [
        (1, "ce", LINF, False),
        (2, "ce", ThreatModel("L2", 1.0), False),
        (2, "mixed 0.4", LINF, False),
        (2, "ce", LINF, True),
    ],
)
def test_whole_steps_equal_autograds(monkeypatch, epochs, objective, threat, affine):
    net, items = small_ingredients()
    items.sort(key=lambda item: item.digest)  # the order of the initial logits
    real = initial_logits
    monkeypatch.setattr(
        learning_run, "initial_logits", lambda *arguments: real(*arguments).double()
    )
    got = learn_digits(
        items,
        network=net,
        detach=0.0,
        lr=5.0,
        momentum=0.9,
        epochs=epochs,
        objective=objective,
        threat=threat,
        affine=affine,
    )
    alpha, buffers = learn_by_autograd(
        net,
        items,
        epochs * STEPS_PER_EPOCH,
        lr=5.0,
        momentum=0.9,
        objective=objective,
        threat=threat,
        affine=affine,
    )
    first = torch.softmax(real(len(got.layers), 3, "xavier", trained_seed()).double(), 1)
    assert (alpha - first).abs().max() > 1e-3
    assert relative_error(got.alpha - first, alpha - first) < 1e-9
    for name, tensor in got.tracked.items():
        assert torch.allclose(tensor, buffers[name], rtol=1e-10), name


def graph_leaves(loss):
    """Return the leaf tensors of the graph of a loss, by id."""
    leaves, waiting, seen = {}, [loss.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves[id(node.variable)] = node.variable
        waiting += [before for before, _ in node.next_functions]
    return leaves


def test_the_graph_holds_one_network(monkeypatch):
    real, sizes = learning_run.mean_objective_loss, []

    def checked_loss(model, *rest, **options):
        loss = real(model, *rest, **options)
        leaves = graph_leaves(loss) if loss.requires_grad else {}
        assert set(leaves) == {id(p) for p in model.parameters() if p.requires_grad}
        sizes.append(sum(leaf.numel() for leaf in leaves.values()))
        return loss

    monkeypatch.setattr(learning_run, "mean_objective_loss", checked_loss)
    items = resnet_ingredients(4)
    total = sum(items[0].tensors[name].numel() for name in items[0].parameters)
    learn_digits(items, detach=0.0)
    assert sizes == [total] * 2 * STEPS_PER_EPOCH
    sizes.clear()
    learn_digits(items, detach=0.8)
    assert 0 < max(sizes) < total


# detach dropout


def test_with_all_layers_detached_only_statistics_change():
    items = sorted(resnet_ingredients(), key=lambda item: item.digest)
    alpha = learn_digits(items, detach=1.0)
    assert torch.equal(alpha.alpha, start_alpha())
    averaged = mix(items, [1 / 3] * 3, buffers="average").tensors
    assert all(not torch.equal(tensor, averaged[name]) for name, tensor in alpha.tracked.items())


def test_a_detached_layer_gets_no_update_and_keeps_its_momentum(save_every_step, tmp_path):
    states, path = [], tmp_path / "state.pt"

    def read_state(done, total, figures):
        if path.exists():
            states.append(torch.load(path, weights_only=True))

    learn_digits(epochs=6, detach=0.7, state_path=path, on_progress=read_state)
    states.append(torch.load(path, weights_only=True))
    assert [state["step"] for state in states] == list(range(1, 6 * STEPS_PER_EPOCH + 1))
    rested, moved, resting_with_speed = 0, 0, 0
    for before, after in itertools.pairwise(states):
        still = (before["line"][0] == after["line"][0]).all(1)
        speed, later = before["velocity"][0], after["velocity"][0]
        assert torch.equal(speed[still], later[still])
        assert (speed[~still] != later[~still]).any(1).all()
        rested, moved = rested + int(still.sum()), moved + int((~still).sum())
        resting_with_speed += int((speed[still] != 0).any(1).sum())
    assert resting_with_speed > 20
    assert 0.6 < rested / (rested + moved) < 0.8


# start and seeds


def test_zeros_give_the_uniform_soup():
    assert torch.equal(initial_logits(7, 4, "zeros", 0), torch.zeros(7, 4))
    assert torch.equal(
        learn_digits(init="zeros", detach=1.0).alpha,
        torch.full((25, 3), 1 / 3, dtype=torch.float64),
    )


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 9), st.integers(0, 10**6))
def test_xavier_is_uniform_within_its_bounds(n, seed):
    bound, logits = math.sqrt(6 / (1 + n)), initial_logits(400, n, "xavier", seed)
    assert logits.shape == (400, n)
    assert 0.95 * bound < logits.max() <= bound
    assert -bound <= logits.min() < -0.95 * bound
    assert abs(float(logits.mean())) < 0.2 * bound


@pytest.mark.parametrize("affine", [False, True])
def test_learning_starts_at_the_weights_that_init_lists(affine):
    weights = [0.5, 0.2, 0.3]
    learned = learn_digits(init="1/2, 0.2,0.3", affine=affine, detach=1.0)
    expected = torch.tensor([weights] * LAYERS, dtype=torch.float64)
    assert torch.allclose(learned.alpha, expected, rtol=0, atol=1e-6)
    assert torch.equal(learned.start, learned.alpha)


def test_a_softmax_starts_near_0_and_affine_weights_at_it_or_below():
    convex = learn_digits(init="1,0,0", detach=1.0).alpha
    assert torch.allclose(convex[:, 1:], torch.full((LAYERS, 2), 0.01 / 1.02).double(), atol=1e-6)
    affine = learn_digits(init="1.2,0,-0.2", affine=True, detach=1.0).alpha
    expected = torch.tensor([[1.2, 0, -0.2]] * LAYERS, dtype=torch.float64)
    assert torch.allclose(affine, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("init", "affine", "message"),
    [
        ("0.5,0.5", False, "init: got 2 weights, expected 3, one an ingredient"),
        ("0.5,0.5,0.5", False, "init: got 0.5,0.5,0.5, expected weights that sum to 1 and are"),
        ("1,0.5,-0.5", False, "sum to 1 and are at least 0"),
        ("1,0.5,-0.6", True, "expected weights that sum to 1"),
        ("a,b,c", True, 'init: got "a,b,c", expected xavier, zeros or weights such as 0.4,0.6'),
        ("1/0,1,0", True, "expected xavier, zeros or weights"),
        ("nan,1,0", True, "expected xavier, zeros or weights"),
    ],
)
def test_wrong_starts_are_refused(init, affine, message):
    with pytest.raises(RequestError, match=re.escape(message)):
        learn_digits(init=init, affine=affine)


def test_affine_weights_turn_negative_sum_to_1_and_are_mixed_without_leave(tmp_path):
    items = resnet_ingredients()
    learned = learn_digits(items, affine=True, init="1,0,0", detach=0.0, lr=50.0)
    assert float(learned.alpha.min()) < 0
    assert torch.allclose(learned.alpha.sum(1), torch.ones(LAYERS).double(), rtol=0, atol=1e-12)
    learned = Coefficients.load(learned.save(tmp_path / "affine.safetensors"))
    name, row = learned.layers[0], learned.alpha[0].tolist()
    soup = mix(items, learned)
    expected = sum(a * item.tensors[name].double() for a, item in zip(row, items, strict=True))
    assert torch.allclose(soup.tensors[name].double(), expected, rtol=1e-5, atol=1e-7)
    assert soup.provenance["buffers"]["policy"] == "tracked"
    with pytest.raises(RequestError, match='buffers "average": averaged variances can turn'):
        mix(items, learned, buffers="average")
    with pytest.raises(RequestError, match='buffers "average": averaged variances can turn'):
        learn_digits(items, affine=True, buffers="average")


@pytest.mark.parametrize("affine", [False, True])
def test_the_mean_over_the_last_steps_is_that_of_every_step(affine):
    items, alphas = resnet_ingredients(), []
    real = learning_run.LearningRun.mix_layers

    def record(run, active):
        real(run, active)
        alphas.append(run._alpha()[:, run._columns()])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learning_run.LearningRun, "mix_layers", record)
        last = learn_digits(items, affine=affine, detach=0.0)
    assert torch.equal(alphas[-1], last.alpha)
    mean = learn_digits(items, affine=affine, detach=0.0, average_last=0.5)
    expected = torch.stack(alphas[-STEPS_PER_EPOCH:]).mean(0)  # the second of two epochs
    assert torch.allclose(mean.alpha, expected, rtol=0, atol=1e-12)
    assert not torch.equal(mean.alpha, last.alpha)


@pytest.mark.parametrize("more", [{"average_last": 0.9}, {"clean_limit": 0.1}], ids=str)
def test_a_killed_run_resumes_its_mean_and_its_multiplier(save_every_step, tmp_path, more):
    items, path = resnet_ingredients(), tmp_path / "state.pt"
    with pytest.raises(Killed):
        learn_digits(items, **more, state_path=path, on_progress=kill_at(4))
    resumed = learn_digits(items, **more, state_path=path)
    assert_same_coefficients(resumed, learn_digits(items, **more))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dial": {}, "affine": True}, "affine: does not apply to a dial"),
        ({"dial": {}, "average_last": 0.5}, "average_last: does not apply to a dial"),
        ({"early_stop": {}, "average_last": 0.5}, "average_last: early_stop returns one epoch"),
        ({"average_last": 1.0}, "average_last: got 1.0"),
    ],
)
def test_settings_that_do_not_apply_together_are_refused(changes, message):
    with pytest.raises(RequestError, match=message):
        LearnSettings(**changes)


def test_the_seed_determines_the_result():
    first = learn_digits(seed=trained_seed(1))
    assert_same_coefficients(first, learn_digits(seed=trained_seed(1)))
    assert not torch.equal(first.alpha, learn_digits(seed=2).alpha)
    assert not torch.equal(first.alpha, start_alpha(seed=1))


def test_learning_changes_neither_its_inputs_nor_the_global_generator():
    net, items = small_ingredients()
    before = [
        {k: v.clone() for k, v in item.tensors.items()} for item in [*items, Checkpoint.of(net)]
    ]
    generator = torch.random.get_rng_state()
    learn_digits(items, network=net)
    assert torch.equal(generator, torch.random.get_rng_state())
    for item, old in zip([*items, Checkpoint.of(net)], before, strict=True):
        assert all(torch.equal(tensor, old[name]) for name, tensor in item.tensors.items())
    assert all(p.requires_grad and p.grad is None for p in net.parameters())


@pytest.mark.parametrize("order", [(1, 0, 2), (2, 1, 0), (1, 2, 0)])
def test_permuting_ingredients_permutes_coefficients(order):
    items = resnet_ingredients()
    straight, turned = learn_digits(items), learn_digits([items[i] for i in order])
    assert torch.equal(turned.alpha, straight.alpha[:, list(order)])
    assert turned.ingredients == tuple(straight.ingredients[i] for i in order)
    soups = [
        mix(items, c.for_ingredients([i.digest for i in items]), buffers="tracked")
        for c in (straight, turned)
    ]
    assert soups[0].digest == soups[1].digest


# results


@pytest.mark.parametrize("n", [1, 2, 5])
def test_rows_sum_to_one_and_name_every_parameter(n):
    items = resnet_ingredients(n)
    alpha = learn_digits(items)
    assert alpha.alpha.shape == (25, n)
    assert alpha.alpha.dtype == torch.float64
    assert alpha.alpha.min() > 0
    assert torch.allclose(
        alpha.alpha.sum(1), torch.ones(25, dtype=torch.float64), atol=1e-12, rtol=0
    )
    assert alpha.layers == tuple(items[0].parameters)
    alpha.check(n)


def test_the_soup_of_a_single_ingredient_equals_it():
    items = resnet_ingredients(1)
    alpha = learn_digits(items)
    soup = mix(items, alpha, buffers="average")
    assert all(torch.equal(soup.tensors[name], tensor) for name, tensor in items[0].tensors.items())


def test_tracked_statistics_reach_the_soup_and_survive_a_file(tmp_path):
    items = resnet_ingredients()
    alpha = learn_digits(items)
    expected = {
        name
        for name in items[0].tensors
        if name.rpartition(".")[2] in ("running_mean", "running_var", "num_batches_tracked")
    }
    assert set(alpha.tracked) == expected
    assert all(
        int(t) == 2 * STEPS_PER_EPOCH
        for name, t in alpha.tracked.items()
        if name.endswith("num_batches_tracked")
    )
    loaded = Coefficients.load(alpha.save(tmp_path / "alpha.safetensors"))
    assert_same_coefficients(alpha, loaded)
    assert (loaded.layers, loaded.ingredients, loaded.record) == (
        alpha.layers,
        alpha.ingredients,
        alpha.record,
    )
    soup = mix(items, loaded, buffers="tracked")
    assert all(torch.equal(soup.tensors[name], tensor) for name, tensor in alpha.tracked.items())
    assert torch.isfinite(soup.network()(torch.rand(4, 1, 8, 8))).all()
    for name, row in zip(alpha.layers, alpha.alpha, strict=True):
        expected = sum(a * item.tensors[name].double() for a, item in zip(row, items, strict=True))
        assert torch.allclose(soup.tensors[name].double(), expected, atol=1e-6), name


def test_the_record_holds_the_settings_and_the_data():
    alpha = learn_digits(objective="mixed 0.2", lr=3.0, seed=5)
    record = alpha.record
    assert (
        record["learning"]
        | {"threat": "Linf 32/255", "objective": "mixed 0.2", "lr": 3.0, "seed": 5}
        == record["learning"]
    )
    assert record["data"] == DATA.record
    assert record["trained_on"] == ["train"]
    assert [entry["epoch"] for entry in record["history"]] == [1, 2]
    assert all(math.isfinite(entry["loss"]) and entry["loss"] > 0 for entry in record["history"])


def test_learning_lowers_the_loss_it_minimises():
    good, bad = resnet_ingredients(1)[0], resnet_ingredients(1)[0]
    bad = Checkpoint(
        {k: -t if k == "linear.weight" else t for k, t in bad.tensors.items()}, bad.provenance
    )
    good = train(good, DATA, threat="clean", epochs=8, batch_size=32, lr=0.1, precision="float32")
    alpha = learn_digits([good, bad], threat="clean", epochs=4, detach=0.0, init="zeros")
    assert alpha.record["history"][-1]["loss"] < alpha.record["history"][0]["loss"]
    assert alpha.alpha[alpha.layers.index("linear.weight"), 0] > 0.7


@pytest.mark.parametrize(
    ("objective", "threat"),
    [("mixed 0.4", LINF), ("mixed 1", LINF), ("mixed 0.4", "clean"), ("ce", "clean")],
)
def test_objectives_and_threats_run(objective, threat):
    alpha = learn_digits(objective=objective, threat=threat)
    alpha.check(3)
    assert not torch.equal(alpha.alpha, start_alpha())


def test_the_ends_of_mixed_equal_the_pure_objectives():
    assert_same_coefficients(learn_digits(objective="mixed 0"), learn_digits(objective="ce"))
    assert_same_coefficients(
        learn_digits(objective="mixed 1"), learn_digits(objective="ce", threat="clean")
    )
    assert not torch.equal(
        learn_digits(objective="mixed 0.5").alpha, learn_digits(objective="ce").alpha
    )


# kill and resume


@pytest.mark.parametrize("kills", [[1], [2], [3], [5], [2, 4, 4], [9]])
def test_a_killed_run_resumes_bit_for_bit(save_every_step, tmp_path, kills):
    items, path, seen = resnet_ingredients(), tmp_path / "state.pt", []
    for step in kills:
        with pytest.raises(Killed):
            learn_digits(items, epochs=3, state_path=path, on_progress=kill_at(step))
    assert path.exists() == (kills[-1] > 1)
    resumed = learn_digits(
        items,
        epochs=3,
        state_path=path,
        on_progress=lambda done, total, _: seen.append((done, total)),
    )
    assert seen == [(done, 9) for done in range(kills[-1], 10)]
    whole = learn_digits(items, epochs=3)
    assert_same_coefficients(resumed, whole)
    assert resumed.record == whole.record


@pytest.mark.parametrize("step", [1, 3, 5, 9])
def test_an_interrupted_run_saves_every_step_that_it_took(tmp_path, step):
    items, path, seen = resnet_ingredients(), tmp_path / "state.pt", []
    with pytest.raises(KeyboardInterrupt):
        learn_digits(items, epochs=3, state_path=path, on_progress=interrupt_at(step))
    resumed = learn_digits(
        items, epochs=3, state_path=path, on_progress=lambda done, *_: seen.append(done)
    )
    assert seen == list(range(step + 1, 10))
    whole = learn_digits(items, epochs=3)
    assert_same_coefficients(resumed, whole)
    assert resumed.record == whole.record


def test_a_finished_run_takes_no_more_steps(tmp_path):
    path, seen = tmp_path / "state.pt", []
    whole = learn_digits(state_path=path)
    assert_same_coefficients(
        whole, learn_digits(state_path=path, on_progress=lambda *event: seen.append(event))
    )
    assert seen == []


@pytest.mark.parametrize(
    "changes",
    [
        {"lr": 2.0},
        {"threat": "clean"},
        {"seed": 9},
        {"detach": 0.1},
        {"items": True},
    ],
)
def test_the_state_of_another_run_is_refused(tmp_path, changes):
    path = tmp_path / "state.pt"
    learn_digits(state_path=path)
    before = path.read_bytes()
    items = resnet_ingredients(2) if changes.pop("items", False) else None
    with pytest.raises(CheckpointError, match=r"state\.pt.*other settings.*delete it"):
        learn_digits(items, state_path=path, **changes)
    assert path.read_bytes() == before


# what is refused


def test_ingredients_of_other_shapes_are_refused():
    wide = Checkpoint.of(load_model("resnet9:width=4", channels=1))
    with pytest.raises(
        IngredientMismatch, match=r"prep\.0\.weight.*\(2, 1, 3, 3\).*\(4, 1, 3, 3\)"
    ):
        learn_digits([*resnet_ingredients(1), wide])


def test_a_non_finite_loss_is_an_error():
    broken = [
        Checkpoint({**c.tensors, "linear.weight": c.tensors["linear.weight"] * 1e38}, c.provenance)
        for c in resnet_ingredients()
    ]
    # Whether the logits or only their loss overflows depends on the trained weights.
    message = r"learn: the loss became (nan|inf) at step 0, (first in layer|though)"
    with pytest.raises(Diverged, match=message):
        learn_digits(broken)


def test_a_network_with_other_classes_is_refused():
    other = Checkpoint.of(load_model("resnet9:width=2", channels=1, classes=7))
    with pytest.raises(ModelError, match=r"\(2, 7\).*expected 10 classes.*digits"):
        learn_digits([other, other])


@pytest.mark.parametrize(
    "wrong",
    [
        {"detach": -0.1},
        {"detach": 1.5},
        {"epochs": 0},
        {"batch_size": 1},
        {"lr": 0.0},
        {"lr": float("nan")},
        {"init": "ones"},
        {"schedule": "linear"},
        {"objective": "mixed 2"},
        {"threat": "Linf -1/255"},
        {"precision": "int8"},
    ],
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(RequestError) as caught:
        learn_digits(**wrong)
    assert "\n" not in str(caught.value)
    assert next(iter(wrong)) in str(caught.value) or "eps" in str(caught.value)


def test_no_ingredients_are_refused():
    with pytest.raises(CheckpointError, match="got none"):
        learn([], DATA, threat=LINF)


@pytest.mark.parametrize("named", ["all", "the first", "in the files"])
def test_files_whose_names_need_fitting_are_learned_and_mixed(named, tmp_path):
    items = []
    for number, item in enumerate(resnet_ingredients(2)):
        path = tmp_path / f"{number}.pth"
        torch.save({f"1.{name}": tensor for name, tensor in item.tensors.items()}, path)
        if named != "the first" or not items:
            wrapped = Checkpoint.load(path).with_network("resnet9:width=2", channels=1)
        else:
            wrapped = Checkpoint.load(path)
        if named == "in the files":
            wrapped = Checkpoint.load(wrapped.save(tmp_path / f"{number}.safetensors"))
        items.append(wrapped)
    alpha = learn_digits(items, epochs=1, detach=0.0)
    fitted = items[0].with_names_of(items[0].network())
    assert set(alpha.layers) <= set(fitted.tensors)
    assert set(mix(items, alpha).tensors) == set(fitted.tensors)
