"""Count what the processes of one training step and one learning step exchange.

    torchrun --nproc-per-node 2 benchmarks/exchanged_bytes.py resnet18 --ingredients 2

prints the bytes that each process puts into sums, as a table in Markdown.
"""

import argparse

import torch

import robustsoup as rs
from robustsoup import distributed

BATCH, STEPS = 8, 2


def count_step(work: str, network: torch.nn.Module, data: rs.Split, ingredients: int) -> float:
    """Return the bytes of one step: the mean over a run of `STEPS` steps."""
    settings = {"threat": "Linf 8/255", "epochs": 1, "batch_size": BATCH, "attack_steps": 1}
    checkpoint = rs.Checkpoint.of(network)
    before = distributed.exchanged_bytes()
    if work == "train":
        rs.train(network, data, device="cpu", **settings)
    else:
        ends = [checkpoint] * ingredients
        rs.learn(ends, data, detach=0.0, network=network, device="cpu", **settings)
    return (distributed.exchanged_bytes() - before) / STEPS


def main() -> None:
    """Print the table in the first process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--ingredients", type=int, default=2)
    options = parser.parse_args()
    distributed.start()
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(BATCH * STEPS, 3, 32, 32, generator=generator)
    data = rs.Split.from_tensors(images, torch.arange(len(images)) % 10)
    network = rs.load_model(options.model)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    for work in ("train", "learn"):
        counted = count_step(work, network, data, options.ingredients)
        if distributed.is_first():
            print(f"| {options.model} | {parameters:,} | {work} | {counted:,.0f} |")
    distributed.stop()


if __name__ == "__main__":
    main()
