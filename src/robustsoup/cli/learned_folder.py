"""The folder that `robustsoup learn` writes: coefficients and their soup, or a dial."""

from dataclasses import replace
from pathlib import Path

from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.checkpoints.wrapping import PICKLE_ENDINGS, soup_ending
from robustsoup.files import remove_file
from robustsoup.reports import draw_dial, draw_learned, save_plot, write_coefficient_csv
from robustsoup.reports.card import CARD, find_other_digests, is_own_card, make_card, write_card
from robustsoup.runs.context import Context
from robustsoup.runs.description import describe_checkpoint
from robustsoup.settings import LearnSettings
from robustsoup.soups.coefficients import Coefficients, Dial
from robustsoup.soups.mixing import mix

FILES = (
    *(f"soup{ending}" for ending in (".safetensors", *PICKLE_ENDINGS)),
    "coefficients.safetensors",
    "coefficients.csv",
    "dial.safetensors",
)
DIAL_POSITIONS = (0.0, 0.25, 0.5, 0.75, 1.0)


class LearnedFolder:
    """Writes learned coefficients or a dial, and removes the other files of earlier runs.

    Attributes:
        path: The folder.
        names: One name for each ingredient.
    """

    def __init__(self, path: Path, names: list[str]) -> None:
        self.path = path
        self.names = names

    def write(
        self,
        learned: Coefficients | Dial,
        ingredients: list[Checkpoint],
        context: Context,
        *,
        policy: str,
        base: Checkpoint | None,
        settings: LearnSettings,
    ) -> list[str]:
        """Write coefficients, soup, card, table and figure, or a dial and its figure.

        Args:
            learned: What `learn` or `learn_dial` returned.
            ingredients: The checkpoints that the soup mixes.
            context: Data for the recalibrating policies, and device.
            policy: BatchNorm statistics of the soup.
            base: Checkpoint whose statistics the policy "base" copies.
            settings: Threat model and seed for the recalibrating policies.

        Returns:
            Lines that describe the result.
        """
        if isinstance(learned, Dial):
            return self._write_dial(learned)
        soup = mix(
            ingredients,
            learned,
            buffers=policy,
            base=base if policy == "base" else None,
            calibrate_on=context.data.train,
            threat=settings.threat,
            device=context.device,
            seed=settings.seed,
        )
        kept_card = self._write_soup(learned, soup, _soup_names(ingredients[0]))
        means = f"{self.path}: mean coefficients {self._describe_means(learned)}"
        return [means, *([kept_card] if kept_card else [])]

    def _write_soup(
        self, learned: Coefficients, soup: Checkpoint, soup_names: set[str]
    ) -> str | None:
        """Write a soup and its card; return why an edited card stayed."""
        self._remove_others({"coefficients.safetensors", "coefficients.csv", *soup_names})
        learned.save(self.path / "coefficients.safetensors")
        for name in sorted(soup_names):
            soup.save(self.path / name)
        write_coefficient_csv(learned, self.names, self.path / "coefficients.csv")
        save_plot(draw_learned(learned, self.names, "coefficients by layer"), self.path)
        return self._write_card(soup_names)

    def _write_card(self, soup_names: set[str]) -> str | None:
        description = describe_checkpoint(self.path / "soup.safetensors")
        files = [self.path / name for name in sorted(soup_names)]
        digests = find_other_digests(files, description.checkpoint.digest)
        return write_card(replace(make_card(description), digests=digests), self.path)

    def _write_dial(self, dial: Dial) -> list[str]:
        self._remove_others({"dial.safetensors"})
        file = self.path / "dial.safetensors"
        dial.save(file)
        positions = [(f"t = {t:g}", dial.at(t)) for t in DIAL_POSITIONS]
        save_plot(draw_dial(positions, self.names, "dial: coefficients by layer"), self.path)
        ends = "; ".join(f"t = {t:g}: {self._describe_means(dial.at(t))}" for t in (0, 1))
        return [
            f"{self.path}: mean coefficients at the robust and the clean end: {ends}",
            f"next: robustsoup mix ... --coefficients {file} --at 0.7 -o soup.safetensors",
        ]

    def _remove_others(self, written: set[str]) -> None:
        if is_own_card(self.path / CARD):
            remove_file(self.path / CARD)
        for name in FILES:
            if name not in written:
                remove_file(self.path / name)

    def _describe_means(self, coefficients: Coefficients) -> str:
        means = coefficients.alpha.mean(0).tolist()
        return " ".join(f"{name} {mean:.2f}" for name, mean in zip(self.names, means, strict=True))


def _soup_names(first: Checkpoint) -> set[str]:
    """Return the soup's files: .safetensors, and one in the format of a foreign ingredient."""
    return {"soup.safetensors", f"soup{soup_ending(first.path, first.wrapping)}"}
