"""A training script as a user may have it, without robustsoup: three checkpoints, and a check of the soup made of them.

The network is its own class and expects normalised inputs; the files hold {"state_dict": {"module...": ...}, "epoch": n}.

    python plain_pytorch.py train CIFAR_FOLDER            writes eps2.pth, eps8.pth, eps16.pth
    robustsoup search eps2.pth eps8.pth eps16.pth --model plain_pytorch:Net --data cifar10 --threat "Linf 8/255" \
        --normalize 0.4914,0.4822,0.4465 0.2471,0.2435,0.2616 --samples 1000 --steps 20 -o best
    python plain_pytorch.py test CIFAR_FOLDER best/soup.pth
"""

import pickle
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

MEAN = torch.tensor([0.4914, 0.4822, 0.4465]).view(1, 3, 1, 1)
STD = torch.tensor([0.2471, 0.2435, 0.2616]).view(1, 3, 1, 1)


class Net(nn.Module):
    """Four convolutions and a linear layer; takes normalised images."""

    def __init__(self):
        super().__init__()
        widths = [3, 16, 32, 64, 128]
        self.features = nn.Sequential(
            *[
                layer
                for a, b in zip(widths, widths[1:])
                for layer in (
                    nn.Conv2d(a, b, 3, padding=1),
                    nn.BatchNorm2d(b),
                    nn.ReLU(),
                    nn.MaxPool2d(2),
                )
            ]
        )
        self.head = nn.Linear(512, 10)

    def forward(self, x):
        return self.head(self.features(x).flatten(1))


def read(folder, names):
    parts = [pickle.loads((Path(folder) / name).read_bytes(), encoding="bytes") for name in names]
    images = np.concatenate([part[b"data"] for part in parts]).reshape(-1, 3, 32, 32)
    return torch.from_numpy(images).float() / 255, torch.tensor(
        sum((part[b"labels"] for part in parts), [])
    )


def pgd(net, x, y, eps, steps=2):
    x_adv = x.clone()
    for _ in range(steps):
        x_adv.requires_grad_()
        grad = torch.autograd.grad(F.cross_entropy(net((x_adv - MEAN) / STD), y), x_adv)[0]
        x_adv = (x + (x_adv.detach() + eps * grad.sign() - x).clamp(-eps, eps)).clamp(0, 1)
    return x_adv.detach()


def fit(net, x, y, eps, epochs, lr):
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * (len(x) // 128))
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(128)[:-1]:
            net.eval()
            x_adv = pgd(net, x[rows], y[rows], eps)
            net.train()
            optimizer.zero_grad()
            F.cross_entropy(net((x_adv - MEAN) / STD), y[rows]).backward()
            optimizer.step()
            schedule.step()


def train(folder):
    torch.manual_seed(0)
    x, y = read(folder, [f"data_batch_{i}" for i in range(1, 6)])
    base = Net()
    fit(base, x, y, 1 / 255, epochs=3, lr=0.05)
    for eps in (2, 8, 16):
        net = Net()
        net.load_state_dict(base.state_dict())
        fit(net, x, y, eps / 255, epochs=1, lr=0.02)
        state = {f"module.{name}": tensor for name, tensor in net.state_dict().items()}
        torch.save({"state_dict": state, "epoch": 4}, f"eps{eps}.pth")
        print(f"eps{eps}.pth")


def test(folder, path):
    content = torch.load(path, weights_only=True)
    net = Net()
    net.load_state_dict(
        {name.removeprefix("module."): tensor for name, tensor in content["state_dict"].items()}
    )
    x, y = read(folder, ["test_batch"])
    net.eval()
    with torch.no_grad():
        right = sum(
            (net((a - MEAN) / STD).argmax(1) == b).sum().item()
            for a, b in zip(x.split(500), y.split(500))
        )
    print(
        f"{path}: epoch {content['epoch']}, clean accuracy on the whole test set {right / len(y):.1%}"
    )


if __name__ == "__main__":
    {"train": train, "test": test}[sys.argv[1]](*sys.argv[2:])
