"""Several processes share each batch: one step is that of one process."""

import pytest
import torch
from ranks import run_ranks
from shared_steps import (
    NORM_LAYERS,
    normalise_in_sync,
    take_learning_step,
    take_subspace_step,
    take_training_step,
    train_in_batches,
    train_line,
    train_shared,
    train_until,
)
from torch import nn

from robustsoup.errors import RequestError
from robustsoup.training import adversarial_loss
from robustsoup.training.sharing import BatchShare, synchronised_batchnorm

STEPS = {
    "train": take_training_step,
    "learn": take_learning_step,
    "subspace": take_subspace_step,
}


@pytest.fixture
def alone(monkeypatch):
    """Take a step in this process, and restore the attack that the step replaced."""
    monkeypatch.setattr(adversarial_loss, "attack_batch", adversarial_loss.attack_batch)
    return lambda verb, *arguments: STEPS[verb](*arguments)


def largest_difference(tensors, expected):
    assert tensors.keys() == expected.keys()
    return max(float((tensors[name] - expected[name]).abs().max()) for name in expected)


@pytest.mark.parametrize("world", [pytest.param(2, marks=pytest.mark.scale), 3])
@pytest.mark.parametrize(
    "objective", ["mixed 0.3", pytest.param("trades", marks=pytest.mark.scale)]
)
@pytest.mark.parametrize("verb", STEPS)
def test_a_step_is_that_of_one_process(alone, verb, objective, world):
    loss, grads, state, _ = alone(verb, objective, "sync")
    assert all(grad.dtype == torch.float64 for grad in grads.values())
    assert max(float(grad.abs().max()) for grad in grads.values()) > 1e-3
    for shared in run_ranks(world, STEPS[verb], objective, "sync"):
        assert abs(float(shared[0] - loss)) < 1e-10
        assert largest_difference(shared[1], grads) < 1e-10
        assert largest_difference(shared[2], state) < 1e-10


def test_any_batchnorm_normalises_the_global_batch():
    alone, ranks = normalise_in_sync(), run_ranks(3, normalise_in_sync)
    for number in range(len(NORM_LAYERS)):
        outputs, grads, buffers = alone[number]
        for part in range(2):  # the passes
            shared = torch.cat([rank[number][0][part] for rank in ranks])
            assert (shared - outputs[part]).abs().max() < 1e-10
            shared = torch.cat([rank[number][1][part] for rank in ranks])
            assert (shared - grads[part]).abs().max() < 1e-10
        for rank in ranks:
            assert rank[number][2].keys() == buffers.keys()
            for name, buffer in buffers.items():
                assert torch.allclose(rank[number][2][name], buffer, rtol=0, atol=1e-10)


def test_batchnorm_with_a_forward_of_its_own_is_refused(monkeypatch):
    class WithActivation(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x).relu()

    monkeypatch.setattr("robustsoup.distributed.world", lambda: 2)
    network = nn.Sequential(nn.BatchNorm2d(2), WithActivation(2))
    with (
        pytest.raises(RequestError, match="WithActivation has a forward of its own"),
        synchronised_batchnorm(network, "sync"),
    ):
        pass
    with synchronised_batchnorm(network, "per-rank"):
        assert (network(torch.zeros(2, 2, 3, 3)) >= 0).all()


@pytest.mark.parametrize("verb", ["train", "learn"])
def test_ranks_keep_one_network_with_statistics_of_their_own_images(alone, verb):
    _, _, alone_state, _ = alone(verb, "ce", "sync")
    (_, _, first, _), (_, _, second, _) = run_ranks(2, STEPS[verb], "ce", "per-rank")
    assert largest_difference(first, second) == 0
    # Means of equal shares average to that of the batch; variances do not.
    assert (
        largest_difference(
            {"mean": first["norm1.running_mean"]}, {"mean": alone_state["norm1.running_mean"]}
        )
        < 1e-12
    )
    assert not torch.allclose(
        first["norm1.running_var"], alone_state["norm1.running_var"], rtol=1e-12, atol=0
    )


def test_learning_exchanges_the_coefficients_gradient_and_the_statistics():
    layers, n, channels = 9, 3, 4 + 6
    for _, grads, _, counted in run_ranks(2, take_learning_step, "ce", "per-rank"):
        assert grads["alpha"].shape == (layers, n)
        loss, statistics = 8, 2 * channels * 8
        assert counted == layers * n * 8 + statistics + loss


def test_training_exchanges_the_gradients_and_the_statistics():
    channels = 4 + 6
    for _, grads, _, counted in run_ranks(2, take_training_step, "ce", "per-rank"):
        parameters = sum(grad.numel() for grad in grads.values())
        loss, statistics = 8, 2 * channels * 8
        assert counted == parameters * 8 + statistics + loss


def test_shares_are_the_global_batch_in_the_order_of_ranks(monkeypatch):
    batch = torch.arange(32)
    monkeypatch.setattr("robustsoup.distributed.world", lambda: 3)
    shares = []
    for rank in range(3):
        monkeypatch.setattr("robustsoup.distributed.rank", lambda rank=rank: rank)
        shares.append(BatchShare.of(32))
    assert [len(share.take(batch)) for share in shares] == [11, 11, 10]
    assert torch.equal(torch.cat([share.take(batch) for share in shares]), batch)
    assert sum(share.weight for share in shares) == pytest.approx(1)


def test_a_signal_in_one_rank_ends_all_after_the_same_step(tmp_path):
    path = tmp_path / "state.pt"
    ended = run_ranks(2, train_until, 2, train_shared, path)
    assert [type(end) for end in ended] == [KeyboardInterrupt] * 2
    assert [file.name for file in tmp_path.iterdir()] == ["state.pt"]
    for record in run_ranks(3, train_shared, path):
        assert len(record["history"]) == 2
        assert record["versions"]["processes"] == 3
        assert record["training"]["batchnorm"] == "per-rank"


def test_ranks_that_train_a_subspace_share_one_state(tmp_path):
    ended = run_ranks(2, train_until, 2, train_line, tmp_path)
    assert [type(end) for end in ended] == [KeyboardInterrupt] * 2
    assert [file.name for file in tmp_path.iterdir()] == ["0.pt"]
    for record in run_ranks(3, train_line, tmp_path):
        assert len(record["history"]) == 2
        assert record["versions"]["processes"] == 3


def test_a_batch_smaller_than_the_ranks_is_refused():
    for error in run_ranks(3, train_in_batches, 5):
        assert isinstance(error, RequestError)
        assert str(error) == (
            "batch_size: got 5 images for 3 processes, expected 6 or more; start fewer processes"
        )
