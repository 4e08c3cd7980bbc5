"""The data, network and device that all steps of a run share."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.checkpoints.network import record_network
from robustsoup.data import Data, Split
from robustsoup.models import NetworkSettings, build_network


@dataclass(frozen=True)
class Context:
    """The data, network and device that all steps of a run share.

    Attributes:
        data: The data.
        network: How the network is built.
        device: Where steps run.
        network_named: Whether the user named the network, which then comes before every record.
        constants_named: Whether the user named the constants of normalisation.
    """

    data: Data
    network: NetworkSettings
    device: torch.device
    network_named: bool = False
    constants_named: bool = False

    @cached_property
    def train_and_val(self) -> Split:
        """Train and val together, the samples that the paper's protocol fits on."""
        return self.data.unsplit()

    def record_network(self, checkpoint: Checkpoint) -> Checkpoint:
        """Return the checkpoint with a record of its network and its parameters."""
        return record_network(
            checkpoint,
            self.network,
            named=self.network_named,
            constants_named=self.constants_named,
        )

    def fresh_network(self, seed: int) -> nn.Module:
        """Return the network with weights drawn by `seed`.

        A built-in network normalises by the data's mean and standard deviation.
        """
        record = self.data.record
        return build_network(self.network, mean=record["mean"], std=record["std"], seed=seed)
