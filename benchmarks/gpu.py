"""Test and time robustsoup on one device; started by gpu.sh, which says what it needs.

Sections are independent: a failure is recorded in its section, and the next section starts. Fresh
networks are attacked at a radius so small that no image breaks, with their own predictions as
labels, so that every image takes all steps; the pre-trained network is attacked at 8/255. Times of
steps are means between two synchronisations of the device.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from common import LINF, freeze, make_near_copies
from torch import nn

import robustsoup as rs
from robustsoup.attacks.forward import frozen_eval, input_gradient
from robustsoup.attacks.losses import ce
from robustsoup.data import Data, Split, to_float

ROOT = Path(__file__).parent.parent
Section = dict[str, Any]


TINY = rs.ThreatModel("Linf", 1e-6)
"""A radius at which no prediction of a fresh network changes."""


@dataclass(frozen=True)
class Plan:
    """Sizes, device and data of the run.

    Attributes:
        device: Device to test and time.
        data: Data set.
        attacked: Images and steps of the attack on each fresh network.
        attacked_pretrained: Images and steps of the attack on the pre-trained network.
        step_models: Networks whose training and learning steps are timed.
        batch: Images in a training step.
        steps: Training steps.
        pretrain_model: Network to pre-train.
        pretrain_epochs: Epochs of pre-training.
    """

    device: torch.device
    data: Data
    attacked: dict[str, tuple[int, int]]
    attacked_pretrained: tuple[int, int]
    step_models: tuple[str, ...]
    batch: int
    steps: int
    pretrain_model: str
    pretrain_epochs: int

    @classmethod
    def full(cls, device: torch.device, data: Data) -> "Plan":
        """Return the sizes for a GPU."""
        attacked = {"resnet18": (1000, 50), "wide_resnet": (500, 10)}
        models = ("resnet9", "resnet18")
        return cls(device, data, attacked, (5000, 100), models, 128, 80, "resnet9", 3)

    @classmethod
    def small(cls, device: torch.device, data: Data) -> "Plan":
        """Return small sizes, to try the script on a CPU in seconds."""
        # Training with 4 channels corrupts memory in oneDNN's AVX2 kernels (PyTorch 2.13).
        attacked = {"resnet18:width=8": (48, 5), "wide_resnet:depth=10,width=1": (48, 5)}
        models = ("resnet18:width=8",)
        return cls(device, data, attacked, (48, 5), models, 32, 5, "resnet9:width=4", 1)

    def load_network(self, model: str) -> nn.Module:
        """Return a network with fresh weights for the data, on the device."""
        record = self.data.record
        network = rs.load_model(
            model, channels=record["channels"], mean=record["mean"], std=record["std"]
        )
        return network.to(self.device, memory_format=torch.channels_last)

    def wait(self) -> None:
        """Wait until the device has finished its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds_of(self, work: Callable[[], object]) -> float:
        """Return the seconds that `work` takes, including work on the device."""
        self.wait()
        started = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - started


def run_tests(plan: Plan) -> Section:
    """Run tests/test_gpu.py in a separate process."""
    if importlib.util.find_spec("pytest") is None:
        return {"left_out": "pytest is not installed"}
    # Warnings of other versions of the libraries are not faults of the device.
    command = [sys.executable, "-m", "pytest", "tests/test_gpu.py", "--tb=short", "-W", "default"]
    if plan.device.type == "cuda" and importlib.util.find_spec("xdist") is not None:
        command += ["-n", "8"]  # without a GPU all of them are skipped
    if importlib.util.find_spec("hypothesis") is None:
        command.append("--noconftest")
    done = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        check=False,
        text=True,
        timeout=240,
        env=dict(os.environ),
    )
    lines = done.stdout.strip().splitlines()
    return {
        "passed": done.returncode == 0,
        "summary": lines[-1] if lines else done.stderr.strip()[-300:],
        "failures": [line for line in lines if line.startswith(("FAILED", "ERROR"))],
        "output": "\n".join(lines[-80:]) if done.returncode else "",
    }


def split_labelled_by(network: nn.Module, split: Split, device: torch.device) -> Split:
    """Return the split labelled by the network's predictions, so that all samples are correct."""
    with torch.no_grad():
        parts = [
            network(to_float(images).to(device)).argmax(1) for images in split.images.split(128)
        ]
    return replace(split, labels=torch.cat(parts).cpu())


def time_pass(plan: Plan, network: nn.Module, split: Split, precision: str) -> float:
    """Return the seconds of one image's forward and input gradient, at the best batch size."""
    best = float("inf")
    for batch in dict.fromkeys(min(size, len(split)) for size in (64, 128, 256, 512, 1024)):
        x = to_float(split.images[:batch]).to(plan.device)
        x = x.contiguous(memory_format=torch.channels_last)
        y = split.labels[:batch].to(plan.device)

        def take_pass(x: torch.Tensor = x, y: torch.Tensor = y) -> None:
            input_gradient(network, x, y, ce, precision)

        with frozen_eval(network):
            take_pass()
            seconds = statistics.median(plan.seconds_of(take_pass) for _ in range(5))
        best = min(best, seconds / batch)
    return best


def time_attack(plan: Plan) -> Section:
    """Time APGD on fresh networks: the limit, ours and pyautoattack's."""
    rows = []
    for model, (count, steps) in plan.attacked.items():
        network = freeze(plan.load_network(model))
        split = split_labelled_by(network, plan.data.test.first(count), plan.device)
        rows.append({"network": model} | time_attacks_on(plan, network, split, TINY, steps))
    return {"rows": rows}


def time_attack_on_trained(plan: Plan) -> Section:
    """Time APGD on a network that was pre-trained for a few epochs."""
    network = freeze(pretrain(plan).network().to(plan.device, memory_format=torch.channels_last))
    count, steps = plan.attacked_pretrained
    split = plan.data.test.first(min(count, len(plan.data.test)))
    name = f"{plan.pretrain_model}, pre-trained"
    row = {"network": name} | time_attacks_on(plan, network, split, LINF, steps)
    return {"rows": [row]}


def time_attacks_on(
    plan: Plan, network: nn.Module, split: Split, threat: rs.ThreatModel, steps: int
) -> Section:
    """Time the limit, our evaluation and pyautoattack's attack on one network."""
    row: Section = {"images": len(split), "steps": steps}
    for precision in ("float32", "bfloat16"):
        row[precision] = time_evaluation(
            plan, network, split, threat, steps=steps, precision=precision
        )
    with contextlib.suppress(ImportError):
        row["pyautoattack"] = time_pyautoattack(plan, network, split, threat, steps)
        row["times_as_fast"] = {
            precision: row["pyautoattack"]["seconds"] / row[precision]["seconds"]
            for precision in ("float32", "bfloat16")
        }
    return row


def time_evaluation(
    plan: Plan,
    network: nn.Module,
    split: Split,
    threat: rs.ThreatModel,
    *,
    steps: int,
    precision: str,
) -> Section:
    """Time one evaluation, and its unavoidable passes."""

    def evaluate(part: Split) -> rs.Evaluation:
        return rs.evaluate(
            network, part, [threat], steps=steps, precision=precision, device=str(plan.device)
        )

    evaluate(split.first(min(32, len(split))))  # libraries load and choose kernels
    results: list[rs.Evaluation] = []
    seconds = plan.seconds_of(lambda: results.append(evaluate(split)))
    verdicts = results[0].threats[str(threat)]
    passes = int((verdicts.step[verdicts.by > 0] + 1).sum()) + steps * int(verdicts.robust.sum())
    limit = passes * time_pass(plan, network, split, precision)
    return {
        "seconds": seconds,
        "limit_seconds": limit,
        "times_the_limit": seconds / limit if limit else None,
        "clean": results[0].accuracy["clean"].value,
        "robust": results[0].accuracy[threat].value,
        "warnings": results[0].warnings,
    }


def time_pyautoattack(
    plan: Plan, network: nn.Module, split: Split, threat: rs.ThreatModel, steps: int
) -> Section:
    """Time pyautoattack's APGD-CE at the better of two batch sizes, with PyTorch's TF32 setting."""
    from pyautoattack.autopgd_base import APGDAttack

    attack = APGDAttack(
        network,
        n_iter=steps,
        norm="Linf",
        eps=threat.eps,
        loss="ce",
        device=plan.device.type,
        seed=0,
    )
    x = to_float(split.images).to(plan.device)
    y = split.labels.to(plan.device)
    attack.perturb(x[:32], y[:32])
    best: Section = {}
    for batch in (256, 512):
        chunks = list(zip(x.split(batch), y.split(batch), strict=True))

        def attack_all(chunks: list[tuple[torch.Tensor, torch.Tensor]] = chunks) -> None:
            for images, labels in chunks:
                attack.perturb(images, labels)

        seconds = plan.seconds_of(attack_all)
        if not best or seconds < best["seconds"]:
            best = {"seconds": seconds, "batch": batch}
        if batch >= len(split):
            break
    return best


class StepClock:
    """An on_progress callback that takes the mean seconds of a step after a few warm-up steps."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.warm_up = plan, max(plan.steps // 4, 1)
        self.started = self.seconds = 0.0

    def __call__(self, done: int, total: int, figures: str) -> None:
        """Start the clock after the warm-up, and stop it at the last step."""
        if done in (self.warm_up, total):
            self.plan.wait()
            now = time.perf_counter()
            if done == self.warm_up:
                self.started = now
            else:
                self.seconds = (now - self.started) / (total - self.warm_up)


def time_steps(plan: Plan) -> Section:
    """Time steps of adversarial training and of learning a soup of three."""
    return {"rows": [time_steps_of(plan, model) for model in plan.step_models]}


def time_steps_of(plan: Plan, model: str) -> Section:
    """Time a step of training one network, and of learning a soup of three copies."""
    data = plan.data.train.first(plan.batch * plan.steps)
    record = plan.data.record
    common = {"threat": LINF, "epochs": 1, "batch_size": plan.batch, "device": str(plan.device)}
    row: Section = {"network": model, "batch": plan.batch, "attack_steps": 2}
    with tempfile.TemporaryDirectory() as folder:
        paths = make_near_copies(Path(folder), 3, model, channels=record["channels"])
        network = freeze(plan.load_network(model))
        batch = split_labelled_by(network, data.first(plan.batch), plan.device)
        for precision in ("float32", "bfloat16"):
            pass_seconds = plan.batch * time_pass(plan, network, batch, precision)
            train_clock, learn_clock = StepClock(plan), StepClock(plan)
            rs.train(
                paths[0], data, lr=0.01, precision=precision, on_progress=train_clock, **common
            )
            rs.learn(
                paths,
                data,
                precision=precision,
                allow_leakage=True,
                on_progress=learn_clock,
                **common,
            )
            row[precision] = {
                "pass_seconds": pass_seconds,
                "training_over_three_passes": train_clock.seconds / (3 * pass_seconds),
                "training_step_seconds": train_clock.seconds,
                "learning_step_seconds": learn_clock.seconds,
                "learning_over_training": learn_clock.seconds / train_clock.seconds,
            }
    return row


def pretrain(plan: Plan) -> rs.Checkpoint:
    """Pre-train the network of the plan for a few epochs."""
    return rs.train(
        plan.load_network(plan.pretrain_model),
        plan.data.train,
        threat=LINF,
        epochs=plan.pretrain_epochs,
        lr=0.1,
        device=str(plan.device),
    )


def time_pretraining(plan: Plan) -> Section:
    """Time an epoch of pre-training, and evaluate the network."""
    results: list[rs.Checkpoint] = []
    seconds = plan.seconds_of(lambda: results.append(pretrain(plan)))
    test = plan.data.test.first(min(1000, len(plan.data.test)))
    accuracy = rs.evaluate(results[0], test, [LINF], steps=20, device=str(plan.device)).accuracy
    return {
        "network": plan.pretrain_model,
        "epochs": plan.pretrain_epochs,
        "seconds_per_epoch": seconds / plan.pretrain_epochs,
        "precision": results[0].provenance["training"]["precision"],
        "clean": str(accuracy["clean"]),
        "robust": str(accuracy[LINF]),
    }


SECTIONS: dict[str, Callable[[Plan], Section]] = {
    "tests": run_tests,
    "attack": time_attack,
    "attack_on_trained": time_attack_on_trained,
    "steps": time_steps,
    "pretraining": time_pretraining,
}


def run_sections(plan: Plan, names: list[str], out: Path) -> dict[str, Section]:
    """Run the sections, writing the results after each one."""
    results: dict[str, Section] = {"machine": describe(plan)}
    for name in names:
        section = SECTIONS[name]
        started = time.perf_counter()
        print(f"{name} ...", flush=True)
        try:
            results[name] = section(plan)
        except Exception as error:
            traceback.print_exc()
            results[name] = {"error": f"{type(error).__name__}: {error}"}
        results[name]["section_seconds"] = time.perf_counter() - started
        out.mkdir(parents=True, exist_ok=True)
        (out / "gpu.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        (out / "gpu.md").write_text(render_table(results), encoding="utf-8")
        print(f"{name}: {results[name]['section_seconds']:.0f} s", flush=True)
    return results


def describe(plan: Plan) -> Section:
    """Return the device and the versions."""
    cuda = plan.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or "cpu",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def render_table(results: dict[str, Section]) -> str:
    """Return the results as Markdown for docs/benchmarks.md."""
    machine = results["machine"]
    lines = [
        (
            f"Machine: {machine['device']}; PyTorch {machine['torch']} (CUDA {machine['cuda']}); "
            f"{machine['date']}; `benchmarks/gpu.sh`."
        ),
        "",
        "| what | float32 | bfloat16 |",
        "|---|---|---|",
    ]
    attacks = [results.get(name, {}) for name in ("attack", "attack_on_trained")]
    for row in (row for section in attacks for row in section.get("rows", ())):
        what = f"APGD-CE-{row['steps']}, {row['network']}, {row['images']} images"
        cells = [f"{row[p]['seconds']:.2f} s" for p in ("float32", "bfloat16")]
        lines.append(f"| {what} | {' | '.join(cells)} |")
        cells = [f"{row[p]['times_the_limit']:.2f} x" for p in ("float32", "bfloat16")]
        lines.append(f"| - relative to the limit | {' | '.join(cells)} |")
        if "times_as_fast" in row:
            cells = [f"{row['times_as_fast'][p]:.2f} x" for p in ("float32", "bfloat16")]
            peer = f"- as fast as pyautoattack (batch {row['pyautoattack']['batch']})"
            lines.append(f"| {peer} | {' | '.join(cells)} |")
    for row in results.get("steps", {}).get("rows", ()):
        where = f"{row['network']}, batch {row['batch']}"
        for key, what in (
            ("training_step_seconds", f"step of training, {where}"),
            ("learning_step_seconds", f"step of learning, 3 ingredients, {where}"),
        ):
            cells = [f"{1000 * row[p][key]:.1f} ms" for p in ("float32", "bfloat16")]
            lines.append(f"| {what} | {' | '.join(cells)} |")
        cells = [f"{row[p]['training_over_three_passes']:.2f} x" for p in ("float32", "bfloat16")]
        lines.append(f"| - training relative to three passes | {' | '.join(cells)} |")
    section = results.get("pretraining", {})
    if "seconds_per_epoch" in section:
        lines += [
            "",
            (
                f"Pre-training {section['network']} ({section['precision']}): "
                f"{section['seconds_per_epoch']:.1f} s an epoch; after {section['epochs']} epochs "
                f"clean {section['clean']}, robust {section['robust']}."
            ),
        ]
    tests = results.get("tests", {})
    summary = tests.get("summary") or tests.get("left_out") or tests.get("error", "")
    lines += ["", f"tests/test_gpu.py: {summary}"]
    errors = [
        f"{name}: {section['error']}" for name, section in results.items() if "error" in section
    ]
    return "\n".join([*lines, *errors]) + "\n"


def main() -> int:
    """Parse the options and run; return 1 if a section failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="the folder that holds cifar-10-batches-py")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--small", action="store_true", help="digits and tiny networks")
    parser.add_argument("-o", "--out", type=Path, default=Path("gpu-results"))
    parser.add_argument("--only", nargs="+", default=list(SECTIONS), choices=list(SECTIONS))
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device; to try the script: --device cpu --small")
    device = torch.device(options.device)
    if options.small:
        plan = Plan.small(device, rs.load_data("digits"))
    else:
        plan = Plan.full(device, rs.load_data("cifar10", root=options.data))
    results = run_sections(plan, options.only, options.out)
    print(render_table(results))
    failed = [n for n, s in results.items() if "error" in s or s.get("passed") is False]
    if failed:
        print(f"failed: {', '.join(failed)}; see {options.out / 'gpu.json'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
