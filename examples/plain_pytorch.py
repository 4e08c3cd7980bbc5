"""A training script that does not use robustsoup: it writes three checkpoints and tests a soup.

The network is its own class and expects normalised inputs. Each file holds
{"state_dict": {"module...": ...}, "epoch": n}.

    python plain_pytorch.py train CIFAR_FOLDER            # writes eps2.pth, eps8.pth, eps16.pth
    robustsoup search eps2.pth eps8.pth eps16.pth --model plain_pytorch:Net --data cifar10 \
        --threat "Linf 8/255" --normalize 0.4914,0.4822,0.4465 0.2471,0.2435,0.2616 \
        --samples 1000 --steps 20 -o best
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
    """Four convolutions and a linear layer; expects normalised images."""

    def __init__(self):
        super().__init__()
        layers = []
        for inputs, outputs in ((3, 16), (16, 32), (32, 64), (64, 128)):
            convolution = nn.Conv2d(inputs, outputs, 3, padding=1)
            layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(512, 10)

    def forward(self, x):
        """Return (b, 10) logits of normalised images (b, 3, 32, 32)."""
        return self.head(self.features(x).flatten(1))


def read_batches(folder, names):
    """Return images (n, 3, 32, 32) in [0, 1] and labels (n,) of some CIFAR-10 batch files."""
    images, labels = [], []
    for name in names:
        batch = pickle.loads((Path(folder) / name).read_bytes(), encoding="bytes")
        images.append(batch[b"data"].reshape(-1, 3, 32, 32))
        labels += batch[b"labels"]
    return torch.from_numpy(np.concatenate(images)).float() / 255, torch.tensor(labels)


def pgd(net, x, y, eps, steps=2):
    """Return attacked images under Linf eps."""
    x_adv = x.clone()
    for _ in range(steps):
        x_adv.requires_grad_()
        loss = F.cross_entropy(net((x_adv - MEAN) / STD), y)
        (grad,) = torch.autograd.grad(loss, x_adv)
        x_adv = (x + (x_adv.detach() + eps * grad.sign() - x).clamp(-eps, eps)).clamp(0, 1)
    return x_adv.detach()


def fit(net, x, y, eps, *, epochs, lr):
    """Train a network adversarially under Linf eps."""
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
    """Pre-train a network, fine-tune three copies of it, and save them."""
    torch.manual_seed(0)
    x, y = read_batches(folder, [f"data_batch_{i}" for i in range(1, 6)])
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
    """Print the clean accuracy of a checkpoint on the test set."""
    content = torch.load(path, weights_only=True)
    state = {name.removeprefix("module."): tensor for name, tensor in content["state_dict"].items()}
    net = Net()
    net.load_state_dict(state)
    net.eval()
    x, y = read_batches(folder, ["test_batch"])
    correct = 0
    with torch.no_grad():
        for images, labels in zip(x.split(500), y.split(500), strict=True):
            correct += (net((images - MEAN) / STD).argmax(1) == labels).sum().item()
    print(f"{path}: {correct / len(y):.1%} of the test set correct")


if __name__ == "__main__":
    {"train": train, "test": test}[sys.argv[1]](*sys.argv[2:])
