"""The model card: README.md beside a checkpoint, in the form of the Hugging Face Hub.

It holds measured figures alone, and leaves the licence to whoever publishes the weights.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.errors import RobustsoupError
from robustsoup.files import read_regular, remove_file, write_text
from robustsoup.models import NetworkSettings
from robustsoup.reports.commands import name_network
from robustsoup.reports.markup import (
    YamlValue,
    escape_markdown,
    make_table,
    quote_code,
    render_yaml,
)
from robustsoup.reports.measures import CLEAN, SHIFT, UNION, choose_split, list_caveats
from robustsoup.reports.origins import describe_soup_of
from robustsoup.runs.description import Ancestor, Description, StoredEvaluation
from robustsoup.runs.results import ResultRow, Results
from robustsoup.soups.answer import Answer

CARD = "README.md"
MAX_CARD_BYTES = 2**20
OWN_DIGEST = "- sha256 of the weights"
"""What the lines with the digest of the card's own checkpoint start with."""
TAGS = ("robustsoup", "model-soup", "merge", "adversarial-robustness", "image-classification")
SPLIT_ORDER = ("test", "val", "train")

_SEAL = re.compile(r"\n<!-- robustsoup card, sha256 ([0-9a-f]{64}) -->\n\Z")
_HUB_REPO = re.compile(r"hf://([\w.-]+/[\w.-]+)(?:[@/].*)?", re.ASCII)

LIMITS = """\
- The robust accuracies hold for these threat models, these images and these attacks. An attack that
  adapts to the network may break more; nothing here is a certificate.
- Accuracies on the split that chose the soup tend to be too high, since the best of many was taken.
- Other data, corruptions and threat models were not measured unless a line above says so.
"""
LICENCE = """\
Not stated: it follows from the licences of the ingredients and of their data. Whoever publishes the
weights adds `license:` to the header.
"""


@dataclass(frozen=True)
class Card:
    """What a card says.

    Attributes:
        title: Name of the checkpoint.
        file: Name of its file.
        network: The recorded network in words; None if it is not recorded.
        tree: The checkpoint and what it was made of.
        evaluations: Its evaluations.
        choice: The answer of the run that chose it, in sentences.
        beside: Rows of its ingredients with their accuracies on the split `beside_split`.
        beside_split: The split of `beside`.
        warnings: Why figures are doubtful.
        sources: Repositories of the hub that ingredients came from.
        versions: Versions and device of the run.
        arguments: What `Checkpoint.network` takes to build the network, as Python.
        digests: Digest of the weights by file, of those beside the card that hold them under other
            names of tensors.
    """

    title: str
    file: str
    network: str | None
    tree: Ancestor
    evaluations: tuple[StoredEvaluation, ...]
    choice: tuple[str, ...] = ()
    beside: tuple[ResultRow, ...] = ()
    beside_split: str = ""
    warnings: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    versions: dict[str, object] = field(default_factory=dict)
    arguments: str = ""
    digests: Mapping[str, str] = field(default_factory=dict)


def write_run_card(results: Results, folder: Path) -> str | None:
    """Write the card of a run's soup into its folder, unless the card there was edited.

    Args:
        results: The results of the run.
        folder: The run folder.

    Returns:
        Why no card was written; None if it was.

    Raises:
        StorageError: The file cannot be written.
    """
    selection, soup = results.selection, results.soup
    if soup is None or selection is None:
        if is_own_card(folder / CARD):
            remove_file(folder / CARD)
        return None
    try:
        card = _make_run_card(results, selection, soup, folder)
    except (RobustsoupError, StopIteration) as error:
        return f"the soup cannot be read: {error}"
    return write_card(card, folder)


def write_card(card: Card, folder: Path) -> str | None:
    """Write a card into a folder, unless the card there was edited; return as `write_run_card`."""
    target = folder / CARD
    if target.exists() and not is_own_card(target):
        return f"{CARD} was edited and stays as it is; remove it to get a new one"
    write_text(target, render_card(card))
    return None


def find_card(path: Path, digest: str) -> Path | None:
    """Return the card beside a checkpoint that describes its weights, edited or not; else None.

    Args:
        path: The file of the checkpoint.
        digest: sha256 of its weights.
    """
    card = path.parent / CARD
    try:
        text = read_regular(card, MAX_CARD_BYTES).decode()
    except (OSError, UnicodeDecodeError):
        return None
    own_lines = [line for line in text.splitlines() if line.startswith(OWN_DIGEST)]
    is_own = any(digest in line for line in own_lines)  # that of an ingredient stands elsewhere
    return card if "robustsoup card" in text and is_own else None


def is_own_card(path: Path) -> bool:
    """Return whether a file is a card as this program wrote it."""
    try:
        text = read_regular(path, MAX_CARD_BYTES).decode()
    except (OSError, UnicodeDecodeError):
        return False
    seal = _SEAL.search(text)
    return seal is not None and _digest(text[: seal.start()]) == seal[1]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def make_card(description: Description) -> Card:
    """Return the card of a checkpoint: its record, and the evaluations beside it."""
    name = Path(description.checkpoint.name)
    return Card(
        title=name.name.partition(".")[0],
        file=name.name,
        network=_describe_network(description),
        tree=description.tree,
        evaluations=_in_order(description.evaluations),
        warnings=(*description.checkpoint.warnings, *_list_warnings(description.evaluations)),
        arguments=_list_arguments(name.name, description),
    )


def find_other_digests(files: Iterable[Path], digest: str) -> dict[str, str]:
    """Return the digests of files with the same weights, by name, that differ from `digest`.

    The names of tensors count for a digest, and a file in another format may have others.

    Raises:
        CheckpointError: A file cannot be read.
    """
    digests = {file.name: Checkpoint.open(file).digest for file in files}
    return {name: other for name, other in digests.items() if other != digest}


def _make_run_card(results: Results, selection: Answer, soup: str, folder: Path) -> Card:
    """Return the card of the chosen soup.

    Raises:
        CheckpointError: Its file cannot be read.
        StopIteration: The results lack its row.
    """
    description = describe_soup_of(results, folder)
    row = results.row(selection.chosen)
    judged = [
        item
        for item in description.evaluations
        if item.path.name in (f"{row.name}.{split}.json" for split in ("val", "test"))
    ]
    ingredients = [
        item for item in results.rows if item.soup is None and item.name in (row.ingredients or ())
    ]
    split = choose_split(ingredients, results.protocol)
    return Card(
        title=results.name,
        file=soup,
        network=_describe_network(description),
        tree=description.tree,
        evaluations=_in_order(judged),
        choice=tuple(selection.lines()),
        beside=tuple(item for item in ingredients if item.scores(split)),
        beside_split=split,
        warnings=(*_list_warnings(judged), *_list_run_warnings(results)),
        sources=list_sources(results, row),
        versions=dict(results.versions),
        arguments=_list_arguments(soup, description),
        digests=find_other_digests([folder / soup], description.checkpoint.digest),
    )


def _describe_network(description: Description) -> str | None:
    if description.network is None:
        return None
    network = NetworkSettings.from_record(description.network)
    return f"{network.spec}, classes {network.classes}, channels {network.channels}"


def _list_arguments(file: str, description: Description) -> str:
    """Return what `Checkpoint.network` takes to build the network of a file, as Python."""
    if description.network is None:
        return '"package.module:factory"'
    return name_network(file, NetworkSettings.from_record(description.network))[0]


def _in_order(evaluations: Sequence[StoredEvaluation]) -> tuple[StoredEvaluation, ...]:
    """Return the evaluations, those on test first."""

    def place(item: StoredEvaluation) -> int:
        return SPLIT_ORDER.index(item.split) if item.split in SPLIT_ORDER else len(SPLIT_ORDER)

    return tuple(sorted(evaluations, key=place))


def _list_warnings(evaluations: Sequence[StoredEvaluation]) -> tuple[str, ...]:
    return tuple(f"{item.split}: {text}" for item in evaluations for text in item.warnings)


def _list_run_warnings(results: Results) -> Iterator[str]:
    """Yield what a run found about the samples, and whether the requirement held."""
    if results.leakage is None or results.leakage.status != "known":
        why = results.leakage.why if results.leakage else "no record"
        status = results.leakage.status if results.leakage else "unknown"
        yield f"samples seen in training, {status}: {why}"
    yield from results.warnings
    for overlap in results.duplicates:
        yield "duplicates: " + ", ".join(f"{key} {value}" for key, value in overlap.items())
    yield from list_caveats(results)
    if results.selection and results.selection.held_on_test is False:
        yield "the requirement does not hold on test"


def list_sources(results: Results, row: ResultRow) -> tuple[str, ...]:
    """Return the hub's repositories that a soup has its ingredients from, each once."""
    tables = results.recipe.get("ingredients")
    tables = dict(tables) if isinstance(tables, dict) else {}
    tables["pretrained"] = results.recipe
    names = row.ingredients or ()
    used = [
        n for n, share in zip(names, row.coefficients or [1] * len(names), strict=True) if share
    ]
    found_tables = [tables.get(name) for name in used]
    places = [table.get("checkpoint") for table in found_tables if isinstance(table, Mapping)]
    found = [_HUB_REPO.fullmatch(place) for place in places if isinstance(place, str)]
    return tuple(dict.fromkeys(match[1] for match in found if match))


def render_card(card: Card) -> str:
    """Return the text of a card; equal cards give equal text."""
    body = [
        "---",
        *render_yaml(_make_header(card)),
        "---",
        "",
        f"# {escape_markdown(card.title)}",
        "",
        *_render_summary(card),
        *(_render_list("Choice", card.choice) if card.choice else []),
        *_render_ingredients(card),
        *_render_results(card),
        *_render_list("Warnings", card.warnings or ("None was recorded.",)),
        "## Limits",
        "",
        LIMITS,
        *_render_use(card),
        "## Licence",
        "",
        LICENCE,
    ]
    text = "\n".join(body)
    return f"{text}\n<!-- robustsoup card, sha256 {_digest(text)} -->\n"


def _make_header(card: Card) -> dict[str, YamlValue]:
    header: dict[str, YamlValue] = {
        "library_name": "robustsoup",
        "pipeline_tag": "image-classification",
        "tags": list(TAGS),
    }
    if card.sources:
        header["base_model"] = list(card.sources)
        if _count_mixed(card.tree) > 1:
            header["base_model_relation"] = "merge"
    if card.evaluations:
        results: list[YamlValue] = [_make_result(item) for item in card.evaluations]
        header["model-index"] = [{"name": card.title, "results": results}]
    return header


def _make_result(evaluation: StoredEvaluation) -> dict[str, YamlValue]:
    metrics: list[YamlValue] = [
        {
            "type": "accuracy",
            "name": _name_measure(measure, evaluation.attack),
            "value": accuracy.value,
            "args": {
                "hits": accuracy.hits,
                "n": accuracy.n,
                "low": accuracy.low,
                "high": accuracy.high,
                "interval": "95 % Wilson",
            },
        }
        for measure, accuracy in evaluation.accuracy.items()
    ]
    return {
        "task": {"type": "image-classification", "name": "Image classification"},
        "dataset": {
            "name": f"{evaluation.data} ({evaluation.split})",
            "type": evaluation.data,
            "split": evaluation.split,
        },
        "metrics": metrics,
    }


def _name_measure(measure: str, attack: str) -> str:
    if measure == CLEAN:
        return "clean accuracy"
    if measure == SHIFT:
        return "clean accuracy under natural shift"
    return f"accuracy under {'all threat models' if measure == UNION else measure}, {attack}"


def _count_mixed(tree: Ancestor) -> int:
    """Return of how many checkpoints a checkpoint has a share."""
    return sum(parent.coefficient != 0 for parent in tree.parents)


def _render_summary(card: Card) -> list[str]:
    network = "a network that is not recorded" if card.network is None else quote_code(card.network)
    count = _count_mixed(card.tree)
    made = (
        f"One checkpoint of {network}, mixed from {count} fine-tuned checkpoints of that network "
        "by robustsoup. It takes the time and memory of one of them."
        if count > 1
        else f"One checkpoint of {network}."
    )
    lines = [made, "", f"- made: {escape_markdown(card.tree.made or 'no record')}"]
    origins = {(item.digest, item.name) for parent in card.tree.parents for item in parent.parents}
    lines += [
        f"- fine-tuned from: {quote_code(name)}, sha256 of the weights {quote_code(digest)}"
        for digest, name in sorted(origins)
    ]
    lines.append(f"{OWN_DIGEST}: `{card.tree.digest}`")
    lines += [
        f"{OWN_DIGEST} under the names in {quote_code(name)}: {quote_code(digest)}"
        for name, digest in card.digests.items()
    ]
    if card.versions:
        pairs = ", ".join(f"{name} {value}" for name, value in card.versions.items())
        lines.append(f"- made with: {escape_markdown(pairs)}")
    return [*lines, ""]


def _render_ingredients(card: Card) -> list[str]:
    if not card.tree.parents:
        return []
    rows = [
        (
            quote_code(parent.name),
            "–" if parent.coefficient is None else f"{parent.coefficient:.3g}",
            escape_markdown(parent.made or "not recorded here"),
            quote_code(parent.digest),
        )
        for parent in card.tree.parents
    ]
    title = "Ingredients" if len(rows) > 1 else "Made from"
    columns = ("checkpoint", "coefficient", "how it was made", "sha256 of the weights")
    return [f"## {title}", "", *make_table(columns, rows), ""]


def _render_results(card: Card) -> list[str]:
    lines = ["## Results", ""]
    if not card.evaluations:
        return [*lines, "These weights were not evaluated where this card was written.", ""]
    rows = [
        (
            escape_markdown(item.split),
            escape_markdown(measure),
            f"{accuracy.value:.1%}",
            f"[{100 * accuracy.low:.1f}, {100 * accuracy.high:.1f}] %",
            str(accuracy.n),
        )
        for item in card.evaluations
        for measure, accuracy in item.accuracy.items()
    ]
    lines += [*make_table(("split", "measure", "accuracy", "95 % Wilson interval", "n"), rows), ""]
    protocols = [f"{item.split} of {item.data}: {item.attack}" for item in card.evaluations]
    lines += [f"- {escape_markdown(text)}" for text in dict.fromkeys(protocols)]
    lines += ["", *_render_beside(card)]
    masking = [f"{item.split}, {text}" for item in card.evaluations for text in item.masking_check]
    return lines + (_render_list("Masking check", masking) if masking else [])


def _render_beside(card: Card) -> list[str]:
    """Return a table of the ingredients' accuracies, where a run measured them."""
    scores = {row.name: row.scores(card.beside_split) or {} for row in card.beside}
    if not scores:
        return []
    measures = list(next(iter(scores.values())))
    rows = [
        (quote_code(name), *(str(own.get(measure, "–")) for measure in measures))
        for name, own in scores.items()
    ]
    columns = ("ingredient", *(escape_markdown(measure) for measure in measures))
    title = f"The ingredients on {escape_markdown(card.beside_split)}:"
    return [title, "", *make_table(columns, rows), ""]


def _render_list(title: str, texts: Sequence[str]) -> list[str]:
    return [f"## {title}", "", *(f"- {escape_markdown(text)}" for text in texts), ""]


def _render_use(card: Card) -> list[str]:
    if not card.file.endswith(".safetensors"):
        text = f"{quote_code(card.file)} loads with the code that loads the ingredients."
        return ["## Use", "", text, ""]
    file = json.dumps(card.file)
    load = f"rs.Checkpoint.load({file}).network({card.arguments})"
    lines = ["import robustsoup as rs", "", f"network = {load}"]
    return ["## Use", "", "```python", *lines, "```", ""]
