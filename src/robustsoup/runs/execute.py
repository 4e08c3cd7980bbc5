"""execute: do what is missing of a plan, in this process."""

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.checkpoints.network import describe
from robustsoup.data import Data, Split, Synthetic
from robustsoup.diagnosis.landscape import landscape
from robustsoup.errors import DataError, RobustsoupError
from robustsoup.evaluation.evaluate import evaluate
from robustsoup.evaluation.verdicts import Evaluation
from robustsoup.files import link_file, write_text
from robustsoup.models import NetworkSettings, build_network
from robustsoup.progress import Progress
from robustsoup.runs.plan import Plan, Step
from robustsoup.runs.store import Store
from robustsoup.soups.coefficients import Coefficients, load_coefficients
from robustsoup.soups.greedy import greedy
from robustsoup.soups.grid import Alpha, alpha_name, corners
from robustsoup.soups.learning import learn, learn_dial
from robustsoup.soups.mixing import mix
from robustsoup.soups.screening import mark_screened
from robustsoup.soups.selection import Score
from robustsoup.threats import ThreatModel
from robustsoup.training.train import train


@dataclass(frozen=True)
class Context:
    """What all steps share: the data, how the network is built, and where it runs."""

    data: Data
    model: NetworkSettings
    device: torch.device

    @cached_property
    def everything(self) -> Split:
        """All samples that may be fitted on under the paper's protocol: train and val together."""
        return self.data.unsplit()

    def fresh_network(self, seed: int) -> nn.Module:
        """The network with weights drawn from `seed`, normalising by the data's mean and std if it is a built-in one."""
        record = self.data.record
        return build_network(self.model, mean=record["mean"], std=record["std"], seed=seed)

    def describe(self, checkpoint: Checkpoint) -> Checkpoint:
        """Return the checkpoint with a record of its network and its parameters."""
        return describe(checkpoint, self.model)


class Reporter(Protocol):
    """Who is told how a run goes."""

    def begin(self, plan: Plan, missing: Sequence[Step]) -> None:
        """The run begins; only `missing` steps will be done."""

    def progress(self, step: Step, done: int, total: int, figures: str) -> None:
        """`done` of `total` parts of the step are done."""

    def warn(self, text: str) -> None:
        """Something makes a result doubtful."""

    def finished(self, step: Step, figures: str, seconds: float) -> None:
        """The step is finished."""


def execute(plan: Plan, context: Context, store: Store, reporter: Reporter) -> None:
    """Do every step of the plan that the store lacks, in order. What is finished stays finished if one fails."""
    missing = [step for step in plan.steps if not store.has(step.key)]
    reporter.begin(plan, missing)
    worker = _Worker(plan, context, store, reporter.warn)
    for step in missing:
        started = time.perf_counter()
        record = {
            "kind": step.kind,
            "name": step.name,
            "settings": step.settings,
            "parents": step.parents,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "device": str(context.device),
        }
        with store.filling(step.key, record) as folder:
            if folder is None:
                figures = "done by another process"
            else:
                watch = _Watch(folder / "seconds.txt", reporter, step)
                try:
                    figures = worker.run(step, folder, watch)
                except RobustsoupError as error:
                    raise type(error)(f"{step.name}: {error}") from error
                record["seconds"] = watch.stop()
        reporter.finished(step, figures, time.perf_counter() - started)


class _Watch:
    """Tells the reporter how far a step is, and counts its seconds, those before a kill too (to within EVERY)."""

    EVERY = 5.0

    def __init__(self, kept: Path, reporter: Reporter, step: Step) -> None:
        self.kept, self.reporter, self.step = kept, reporter, step
        self.begun = self.written = time.perf_counter()
        with contextlib.suppress(OSError, ValueError):
            self.begun -= float(kept.read_text())

    def __call__(self, done: int, total: int, figures: str) -> None:
        now = time.perf_counter()
        if now - self.written >= self.EVERY:
            self.written = now
            write_text(self.kept, f"{now - self.begun:.3f}")
        self.reporter.progress(self.step, done, total, figures)

    def stop(self) -> float:
        """All seconds so far; nothing is kept of them."""
        self.kept.unlink(missing_ok=True)
        return time.perf_counter() - self.begun


class _Worker:
    def __init__(
        self, plan: Plan, context: Context, store: Store, warn: Callable[[str], None]
    ) -> None:
        self.plan, self.context, self.store = plan, context, store
        self.checkpoint: Callable[[str], Checkpoint] = lru_cache(maxsize=8)(self._checkpoint)
        self.judged: Callable[[str], Evaluation] = lru_cache(maxsize=8)(
            lambda key: Evaluation.load(store.path(key) / "evaluation.json")
        )
        self.warn = warn

    def run(self, step: Step, folder: Path, on_progress: Progress) -> str:
        """Do one step, put its output into `folder`, and return its figures in one line."""
        if step.kind in ("pretrain", "finetune"):
            return self._train(step, folder, on_progress)
        work = {
            "snapshot": self._snapshot,
            "learn": self._learn,
            "dial": self._dial,
            "greedy": self._greedy,
            "mix": self._mix,
            "evaluate": self._evaluate,
            "plane": self._plane,
        }
        return work[step.kind](step, folder, on_progress)

    def _checkpoint(self, key: str) -> Checkpoint:
        if key.startswith("file:"):
            return self.context.describe(self.plan.files[key])
        return Checkpoint.open(self.store.path(key) / "checkpoint.safetensors")

    def _train(self, step: Step, folder: Path, on_progress: Progress) -> str:
        settings = dict(step.settings)
        stop = settings.pop("early_stop")
        val = self.context.data.val.first(stop["samples"]) if stop else None
        if "synthetic" in settings:
            settings["synthetic"] = self._synthetic(step)
        if settings.get("checkpoint_every"):
            settings["on_checkpoint"] = lambda epoch, made: made.save(
                folder / f"epoch{epoch}.safetensors"
            )
        if step.parents:
            network: Checkpoint | nn.Module = self.checkpoint(step.parents[0])
        else:
            network = self.context.fresh_network(settings["seed"])
        trained = train(
            network,
            self._fitted(settings),
            val=val,
            early_stop={name: stop[name] for name in ("steps", "samples")} if stop else None,
            device=str(self.context.device),
            state_path=folder / "state.pt",
            on_progress=on_progress,
            **settings,
        )
        trained.save(folder / "checkpoint.safetensors")
        last = trained.provenance["history"][-1]
        figures = f"loss {last['loss']:.3f}"
        if stop:
            at = trained.provenance["early_stopped_at"]
            best = next(entry for entry in trained.provenance["history"] if entry["epoch"] == at)
            figures += f", epoch {at} kept: val robust loss {best['robust_loss']:.3f}, robust {best['robust_accuracy']:.1%}"
        return figures

    def _fitted(self, settings: dict[str, Any]) -> Split:
        """What a step fits on: train, or, under the paper's protocol, all that was held out from it too."""
        return (
            self.context.everything
            if settings.pop("everything", False)
            else self.context.data.train
        )

    def _snapshot(self, step: Step, folder: Path, on_progress: Progress) -> str:
        made = self.store.path(step.parents[0]) / f"epoch{step.settings['epoch']}.safetensors"
        link_file(made, folder / "checkpoint.safetensors")
        return f"epoch {step.settings['epoch']}"

    def _synthetic(self, step: Step) -> Synthetic:
        """The images that the step's key speaks of, from where the recipe says they are."""
        recipe = self.plan.recipe
        found = Synthetic.open(
            (recipe.pretrain if step.kind == "pretrain" else recipe.finetune).synthetic
        )
        if found.digest != step.settings["synthetic"]:
            raise DataError(
                f"{found.path}: changed since the run was planned; run the same command again"
            )
        return found

    def _learn(self, step: Step, folder: Path, on_progress: Progress) -> str:
        settings = self._with_base(step.settings)
        stop = settings.pop("early_stop", None)
        coefficients = learn(
            [self.checkpoint(key) for key in step.parents],
            self._fitted(settings),
            device=str(self.context.device),
            val=self.context.data.val.first(stop["samples"]) if stop else None,
            early_stop={name: stop[name] for name in ("steps", "samples")} if stop else None,
            allow_leakage=self.plan.recipe.allow_leakage,
            state_path=folder / "state.pt",
            on_progress=on_progress,
            **settings,
        )
        coefficients.save(folder / "coefficients.safetensors")
        for warning in coefficients.record.get("warnings", ()):
            self.warn(f"{step.name}: {warning}")
        return f"loss {coefficients.record['history'][-1]['loss']:.3f}, {_shares(coefficients)}"

    def _with_base(self, settings: dict[str, Any]) -> dict[str, Any]:
        return settings | (
            {"base": self.checkpoint(settings["base"])} if "base" in settings else {}
        )

    def _dial(self, step: Step, folder: Path, on_progress: Progress) -> str:
        settings = self._with_base(step.settings)
        dial = learn_dial(
            [self.checkpoint(key) for key in step.parents],
            self._fitted(settings),
            device=str(self.context.device),
            allow_leakage=self.plan.recipe.allow_leakage,
            state_path=folder / "state.pt",
            on_progress=on_progress,
            **settings,
        )
        dial.save(folder / "dial.safetensors")
        loss = dial.record["history"][-1]["loss"]
        return (
            f"loss {loss:.3f}; robust end: {_shares(dial.at(0))}; clean end: {_shares(dial.at(1))}"
        )

    def _greedy(self, step: Step, folder: Path, on_progress: Progress) -> str:
        """Judge soups one by one; each verdict stays in the folder, so that a killed step goes on."""
        judged = [
            key for key in step.parents if (self.store.path(key) / "evaluation.json").exists()
        ]
        items = [self.checkpoint(key) for key in step.parents if key not in judged]
        n, total = len(items), 2 * len(items) - 1 - len(judged)
        asked = dict(step.settings["evaluate"])
        data = self.context.data.split(asked.pop("split"))
        asked = {
            name: value
            for name, value in asked.items()
            if name not in ("screened", "pool", "after", "keep_points")
        }
        done = 0

        def judge(alpha: Alpha) -> Evaluation:
            nonlocal done
            path = folder / f"{alpha_name(alpha)}.json"
            if not path.exists():
                soup = self._mixed(items, Coefficients.of(alpha), step.settings["mix"])
                evaluate(soup, data, device=str(self.context.device), **asked).save(path)
            done += 1
            found = Evaluation.load(path)
            on_progress(done, total, f"{alpha_name(alpha)} {scores(found)}")
            return found

        alone = [self.judged(key) for key in judged] or [judge(alpha) for alpha in corners(n)]
        tried = greedy(alone, judge, step.settings["score"])
        score = Score.parse(step.settings["score"])
        trace = [{"alpha": list(c.alpha), "score": score.of(c.evaluation.accuracy)} for c in tried]
        chosen = replace(
            Coefficients.of(tried[-1].alpha),
            ingredients=tuple(item.digest for item in items),
            record={"greedy": {"score": str(score), "tried": trace, "split": data.name}},
        )
        chosen.save(folder / "coefficients.safetensors")
        kept = sum(a > 0 for a in tried[-1].alpha)
        return f"{kept} of {n} ingredients kept, {score}: {trace[-1]['score']:.1%}"

    def _mix(self, step: Step, folder: Path, on_progress: Progress) -> str:
        settings, parents = step.settings, list(step.parents)
        if settings["alpha"] is None:
            made = self.store.path(parents.pop())
            if "at" in settings:
                alpha = load_coefficients(made / "dial.safetensors", settings["at"])
                alpha.save(folder / "coefficients.safetensors")
            else:
                alpha = load_coefficients(made / "coefficients.safetensors")
        else:
            alpha = Coefficients.of(settings["alpha"])
        self._mixed([self.checkpoint(key) for key in parents], alpha, settings).save(
            folder / "checkpoint.safetensors"
        )
        return f"buffers {settings['buffers']}"

    def _mixed(
        self, items: list[Checkpoint], alpha: Coefficients, settings: dict[str, Any]
    ) -> Checkpoint:
        return mix(
            items,
            alpha,
            buffers=settings["buffers"],
            seed=settings["seed"],
            calibrate_on=self.context.data.train,
            calibrate_samples=settings.get("samples", 10_000),
            threat=ThreatModel.parse(settings.get("threat", "clean")),
            attack_steps=settings.get("attack_steps", 2),
            base=self.checkpoint(settings["base"]) if "base" in settings else None,
            device=self.context.device,
        )

    def _evaluate(self, step: Step, folder: Path, on_progress: Progress) -> str:
        settings = dict(step.settings)
        checkpoint = self.checkpoint(step.parents[0])
        data = self.context.data.split(settings.pop("split"))
        short, pool, after = settings.pop("screened"), settings.pop("pool"), settings.pop("after")
        evaluation = evaluate(
            checkpoint,
            data,
            device=str(self.context.device),
            state_path=folder / "state.pt",
            on_progress=on_progress,
            pool=[self.judged(key) for key in pool],
            after=self.judged(after) if after else None,
            **settings,
        )
        if short:
            evaluation = mark_screened(evaluation)
        evaluation.save(folder / "evaluation.json")
        for warning in evaluation.warnings:
            self.warn(f"{step.name}: {warning}")
        return scores(evaluation) + " (screened: upper bounds)" * short

    def _plane(self, step: Step, folder: Path, on_progress: Progress) -> str:
        settings = self._with_base(step.settings)
        found = landscape(
            [self.checkpoint(key) for key in step.parents],
            self.context.data.split(settings.pop("split")),
            calibrate_on=self.context.data.train,
            device=str(self.context.device),
            state_path=folder / "state.pt",
            on_progress=on_progress,
            **settings,
        )
        found.save(folder / "landscape.json")
        finite = [value for row in found.loss for value in row if value is not None]
        return (
            f"robust loss {min(finite):.3f} to {max(finite):.3f}" if finite else "no loss is finite"
        )


def scores(evaluation: Evaluation) -> str:
    """The accuracies in one line."""
    return ", ".join(f"{name} {accuracy}" for name, accuracy in evaluation.accuracy.items())


def _shares(coefficients: Coefficients) -> str:
    means = ", ".join(f"{value:.2f}" for value in coefficients.alpha.mean(0).tolist())
    return f"mean coefficients {means}, mean entropy {float(coefficients.entropy().mean()):.2f}"
