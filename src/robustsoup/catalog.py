"""The catalog: one registry for each kind of component, such as attacks or networks.

An entry holds the name, spelling, help text and facts of a component, and the location of its code
("module:name", imported only when used). The command line, recipes, error messages and the
reference pages read the catalog. Users add a component without changing the catalog: as a function
in Python, as "package.module:function", or by an entry point of their package in the group
"robustsoup.<registry name>"; docs/extending.md says which of these ways each registry has. This
module imports no library, and of robustsoup only errors and printable.
"""

import difflib
import importlib
import importlib.metadata
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from robustsoup.errors import RequestError
from robustsoup.printable import first_line


@dataclass(frozen=True)
class Entry:
    """One component that can be chosen by name.

    Attributes:
        name: Name to choose the component by.
        target: Location of its code, "module:name"; "" for a function that a caller passed.
        help: One sentence for help pages.
        spelling: Name with its parameters, such as "mixed A"; "" if there are none.
        source: Paper and arXiv number, if any.
        facts: Properties that callers need before they import the code, listed at each registry.
    """

    name: str
    target: str
    help: str
    spelling: str = ""
    source: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)

    def load(self) -> Any:
        """Import and return the code of the entry."""
        return import_by_name(self.target, label=self.name)


def import_by_name(target: str, *, label: str, error: type[RequestError] = RequestError) -> Any:
    """Import the object that "package.module:name" refers to.

    Args:
        target: A module and a name in it.
        label: Name of the object in error messages, such as 'objective "losses:half"'.
        error: Class of the error to raise.

    Raises:
        RequestError: If the module cannot be imported or has no such name.
    """
    module, _, name = target.partition(":")
    imported = import_user_module(module, label=label, error=error)
    if getattr(imported, name, None) is None:
        raise error(f'{label}: module "{module}" has no "{name}"')
    return getattr(imported, name)


def import_user_module(
    module: str, *, label: str, error: type[RequestError] = RequestError
) -> ModuleType:
    """Import a module, which may be the user's own; arguments and errors as `import_by_name`."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as missing:
        raise error(
            f'{label}: module "{missing.name}" cannot be found; is it on the Python path?'
        ) from missing
    except RequestError:
        raise
    except Exception as problem:
        reason = f"{type(problem).__name__}: {first_line(problem)}"
        raise error(f'{label}: module "{module}" cannot be imported: {reason}') from problem


def import_path(function: object) -> str:
    """Return the name of a function, or of the class of a callable object, as module:name."""
    name = getattr(function, "__qualname__", None) or type(function).__qualname__
    return f"{getattr(function, '__module__', None) or '?'}:{name}"


def check_call(
    function: Callable[..., object],
    arguments: Sequence[str],
    *,
    label: str,
    keywords: Sequence[str] = (),
    error: type[RequestError] = RequestError,
) -> None:
    """Check that a function, which may be the user's own, can be called with some arguments.

    Args:
        function: The function; one without a signature, such as a built-in, passes.
        arguments: What it is called with by position.
        label: Name of the function in the error, such as 'objective "losses:half"'.
        keywords: What it is called with by name.
        error: Class of the error to raise.

    Raises:
        RequestError: If it takes other arguments.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(*arguments, **dict.fromkeys(keywords))
    except TypeError:
        expected = ", ".join([*arguments, *(f"{name}=" for name in keywords)])
        raise error(f"{label}: takes {signature}, expected ({expected})") from None


class Registry(Mapping[str, Entry]):
    """Entries by name, in the order in which help lists them.

    Entry points of the group "robustsoup.NAME" follow the built-in entries; they are looked up
    when a name is not built in, or when the registry is iterated with `all_entries`. With
    `takes_functions`, `find` accepts "package.module:function" too.
    """

    def __init__(self, name: str, *entries: Entry, takes_functions: bool = False) -> None:
        self.name = name
        self.takes_functions = takes_functions
        self._entries = {entry.name: entry for entry in entries}

    def __getitem__(self, name: str) -> Entry:
        """Return the built-in entry called `name`."""
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of the built-in entries."""
        return iter(self._entries)

    def __len__(self) -> int:
        """Return the number of built-in entries."""
        return len(self._entries)

    def all_entries(self) -> dict[str, Entry]:
        """Return the built-in entries and those that installed packages add."""
        return self._entries | {
            name: entry for name, entry in self._plugins().items() if name not in self._entries
        }

    def find(self, name: str) -> Entry | None:
        """Return the entry called `name`, or None; installed packages are searched last."""
        if self.takes_functions and ":" in name:
            return Entry(name, name, "A function by its name.")
        return self._entries.get(name) or self._plugins().get(name)

    def get_entry(self, name: str, *, error: type[RequestError] = RequestError) -> Entry:
        """Return the entry called `name`.

        Raises:
            RequestError: If there is none; the class is `error`, and the text suggests the nearest
                name.
        """
        entry = self.find(name)
        if entry is None:
            names = self.all_entries()
            nearest = difflib.get_close_matches(name, names, 1, 0.4)
            hint = f'; did you mean "{nearest[0]}"?' if nearest else ""
            raise error(f'{self.name}: got "{name}", expected one of {", ".join(names)}{hint}')
        return entry

    def spellings(self) -> str:
        """Return the spellings of the built-in entries, for error messages and help."""
        return ", ".join(entry.spelling or entry.name for entry in self._entries.values())

    def _plugins(self) -> dict[str, Entry]:
        points = importlib.metadata.entry_points(group=f"robustsoup.{self.name}")
        return {p.name: Entry(p.name, p.value, f"from {p.module}") for p in points}


ATTACKS = Registry(
    "attacks",
    Entry(
        "apgd",
        "robustsoup.attacks:apgd",
        "AutoPGD with its step-size schedule.",
        source="Croce and Hein 2020, arXiv:2003.01690; L1: arXiv:2103.01208",
    ),
    Entry(
        "pgd",
        "robustsoup.attacks:pgd",
        "Projected gradient descent with a fixed step size; a baseline.",
        source="Madry et al. 2018, arXiv:1706.06083",
    ),
    Entry(
        "pma",
        "robustsoup.attacks.losses:probability_margin",
        "APGD on the margin of the probabilities (PMA's loss).",
        source="Xie et al. 2024, arXiv:2411.15210",
    ),
    Entry(
        "malt",
        "robustsoup.attacks.malt:rank_targets",
        "APGD towards the classes that a linear network would reach first, the nearest first.",
        source="Melamed et al. 2024, arXiv:2407.02240",
    ),
    Entry(
        "strong",
        "robustsoup.attacks.strong:run_strong",
        "pma, malt and square in turn, each on what survived; any number of classes.",
        source="arXiv:2411.15210, arXiv:2407.02240 and arXiv:1912.00049",
    ),
    Entry(
        "square",
        "robustsoup.attacks.square:square",
        "Random search on the outputs alone, without gradients.",
        source="Andriushchenko et al. 2020, arXiv:1912.00049",
    ),
    Entry(
        "autoattack",
        "robustsoup.attacks.autoattack:attack_chunk",
        "Standard AutoAttack through pyautoattack; requires the extra robustsoup[autoattack].",
        source="Croce and Hein 2020, arXiv:2003.01690",
    ),
)

LOSSES = Registry(
    "losses",
    Entry("ce", "robustsoup.attacks.losses:ce", "Cross-entropy.", facts={"classes": 2}),
    Entry(
        "dlr",
        "robustsoup.attacks.losses:dlr",
        "Difference of logits ratio; invariant to the scale of the logits.",
        source="Croce and Hein 2020, arXiv:2003.01690, Eq. 6",
        facts={"classes": 3, "instead": "margin"},
    ),
    Entry(
        "targeted dlr",
        "robustsoup.attacks.losses:targeted_dlr",
        "DLR towards each of the most likely other classes in turn.",
        source="Croce and Hein 2020, arXiv:2003.01690, Eq. 7",
        facts={"classes": 4, "targeted": True, "instead": "targeted margin"},
    ),
    Entry(
        "margin",
        "robustsoup.attacks.losses:margin",
        "Largest other logit minus that of the label; for 2 classes or more.",
        source="Carlini and Wagner 2017, arXiv:1608.04644",
        facts={"classes": 2},
    ),
    Entry(
        "targeted margin",
        "robustsoup.attacks.losses:targeted_margin",
        "The margin towards each of the most likely other classes in turn.",
        source="Gowal et al. 2019, arXiv:1910.09338",
        facts={"classes": 2, "targeted": True},
    ),
    Entry(
        "probability margin",
        "robustsoup.attacks.losses:probability_margin",
        "Largest other probability minus that of the label (PMA).",
        source="Xie et al. 2024, arXiv:2411.15210",
        facts={"classes": 2},
    ),
)
"""facts: "classes", the fewest classes that the loss needs; "targeted", called with a target;
"instead", the loss to use with fewer classes."""

OBJECTIVES = Registry(
    "objectives",
    Entry(
        "ce",
        "robustsoup.training.objectives:cross_entropy",
        "Cross-entropy on attacked images.",
        source="Madry et al. 2018, arXiv:1706.06083; the paper's Eq. 1",
    ),
    Entry(
        "mixed",
        "robustsoup.training.objectives:mixed",
        "A times the clean loss plus (1 - A) times the attacked loss; the paper calls it TRADES.",
        spelling='"mixed A" as in "mixed 0.4"',
        source="Huang, Adversarial Learned Soups, Eq. 2",
    ),
    Entry(
        "trades",
        "robustsoup.training.objectives:trades",
        "Clean loss plus B times the KL divergence between clean and attacked predictions.",
        spelling='trades, or "trades B" as in "trades 5"',
        source="Zhang et al. 2019, arXiv:1901.08573, Eq. 5",
    ),
)
"""A target takes the numbers that follow the name, as in "mixed 0.4", and returns an Objective."""

MODELS = Registry(
    "models",
    Entry("resnet9", "robustsoup.models.resnet9:resnet9", "Page's ResNet-9; width scales it."),
    Entry("resnet18", "robustsoup.models.resnet:resnet18", "ResNet-18 for small images."),
    Entry("resnet50", "robustsoup.models.resnet:resnet50", "ResNet-50 for small images."),
    Entry(
        "wide_resnet",
        "robustsoup.models.wide_resnet:wide_resnet",
        "DeepMind's WideResNet, 28-10 unless depth and width are given.",
        source="Gowal et al. 2020, arXiv:2010.03593",
        facts={"published_constants": True},
    ),
    Entry(
        "preact_resnet18",
        "robustsoup.models.preact_resnet:preact_resnet18",
        "DeepMind's pre-activation ResNet-18.",
        source="Gowal et al. 2021, arXiv:2110.09468",
        facts={"published_constants": True},
    ),
    Entry(
        "timm",
        "robustsoup.models.timm_networks:TIMM",
        "Any network that timm lists; requires the extra robustsoup[timm].",
        spelling="timm:NAME",
        facts={"library": "timm"},
    ),
    Entry(
        "hf",
        "robustsoup.models.transformers_networks:TRANSFORMERS",
        "An image classifier of transformers, by its config.json in a folder or on the hub; "
        "requires the extra robustsoup[hf].",
        spelling="hf:FOLDER or hf:ORG/NAME",
        facts={"library": "transformers"},
    ),
    Entry(
        "torchvision",
        "robustsoup.models.torchvision_networks:TORCHVISION",
        "A classifier of torchvision; requires the extra robustsoup[torchvision].",
        spelling="torchvision:NAME",
        facts={"library": "torchvision"},
    ),
    Entry(
        "robustbench",
        "robustsoup.models.robustbench_networks:ROBUSTBENCH",
        "A network of RobustBench's model zoo; built in for the checkpoints that fetch offers, "
        "otherwise requires robustbench.",
        spelling="robustbench:NAME",
        facts={"library": "robustbench"},
    ),
)
"""facts: "published_constants", normalises by the constants of the published checkpoints;
"library", the package whose networks follow the name: the target is then a Library."""

DATA_SOURCES = Registry(
    "data",
    Entry("digits", "robustsoup.data.digits:load_digits", "8x8 digits, embedded in the package."),
    Entry("cifar10", "robustsoup.data.cifar:load_cifar10", "CIFAR-10; downloaded once if absent."),
    Entry(
        "cifar100", "robustsoup.data.cifar:load_cifar100", "CIFAR-100; downloaded once if absent."
    ),
    Entry(
        "folder",
        "robustsoup.data.folders:load_folder",
        "One sub-folder of images for each class; requires the extra robustsoup[folders].",
        spelling="folder:PATH",
        facts={"place": "path", "decodes": True},
    ),
    Entry(
        "npz",
        "robustsoup.data.npz:load_npz",
        "Arrays of one file: x_train, y_train, x_test and y_test, or images and labels.",
        spelling="npz:PATH",
        facts={"place": "path"},
    ),
    Entry(
        "hf",
        "robustsoup.data.hub:load_hub",
        "A data set of the Hugging Face Hub, a folder or a .parquet file; requires the extra "
        "robustsoup[datasets].",
        spelling="hf:NAME",
        facts={"place": "path or name", "decodes": True},
    ),
    Entry(
        "wds",
        "robustsoup.data.shards:load_shards",
        "Local .tar shards such as wds:train-{000..009}.tar; requires the extra "
        "robustsoup[webdataset].",
        spelling="wds:PATTERN",
        facts={"place": "path", "decodes": True},
    ),
)
"""facts: "place", what follows the name: "path", or "path or name", where an existing path comes
first; "decodes", image_size and channels apply, because image files are decoded."""

SOUP_METHODS = Registry(
    "methods",
    Entry("uniform", "robustsoup.soups.grid:uniform", "The average of all ingredients."),
    Entry("grid", "robustsoup.soups.grid:grid", "All multiples of a step that sum to 1."),
    Entry(
        "line",
        "robustsoup.soups.grid:line",
        "The grid of two ingredients (wise-ft).",
        source="Wortsman et al. 2021, arXiv:2109.01903",
    ),
    Entry(
        "surrogate",
        "robustsoup.soups.surrogate_search:SurrogateSearch",
        "The grid, of which only the soups that can change the answer are attacked.",
        facts={"needs": "evaluations"},
    ),
    Entry(
        "greedy",
        "robustsoup.soups.greedy:greedy",
        "Adds each ingredient, best first, unless that lowers a score.",
        source="Wortsman et al. 2022, arXiv:2203.05482, recipe 1",
        facts={"needs": "evaluations"},
    ),
    Entry(
        "learned",
        "robustsoup.soups.learning:learn",
        "One softmax over the ingredients for each layer, learned under attack.",
        source="Huang, Adversarial Learned Soups, section 3",
        facts={"needs": "training"},
    ),
    Entry(
        "dial",
        "robustsoup.soups.learning:learn_dial",
        "A whole line of learned soups, from robust to clean.",
        facts={"needs": "training"},
    ),
    Entry(
        "slerp",
        "robustsoup.soups.interpolation:slerp",
        "Two ingredients along the arc between them, tensor by tensor, instead of the line.",
        source="Shoemake 1985, doi:10.1145/325165.325242",
        facts={"needs": "merging", "ingredients": 2},
    ),
    Entry(
        "swap",
        "robustsoup.soups.interpolation:swap",
        "The first ingredient, with the blocks that `blocks` names moved to the second.",
        source="Zhu et al. 2023 (RiFT), arXiv:2308.02533",
        facts={"needs": "merging", "ingredients": 2, "requires": ("blocks",)},
    ),
    Entry(
        "task-arithmetic",
        "robustsoup.soups.task_vectors:task_arithmetic",
        "The base plus a factor times the mean of the task vectors.",
        source="Ilharco et al. 2023, arXiv:2212.04089",
        facts={"needs": "merging", "requires": ("base",)},
    ),
    Entry(
        "ties",
        "robustsoup.soups.task_vectors:ties",
        "Task vectors trimmed to their largest entries, averaged where signs agree.",
        source="Yadav et al. 2023, arXiv:2306.01708",
        facts={"needs": "merging", "requires": ("base",)},
    ),
    Entry(
        "dare",
        "robustsoup.soups.task_vectors:dare",
        "Task vectors of which random entries are dropped and the rest rescaled.",
        source="Yu et al. 2023, arXiv:2311.03099",
        facts={"needs": "merging", "requires": ("base",)},
    ),
    Entry(
        "model-stock",
        "robustsoup.soups.task_vectors:model_stock",
        "The average drawn towards the base, tensor by tensor, by the angle of the task vectors.",
        source="Jang et al. 2024, arXiv:2403.19522",
        facts={"needs": "merging", "requires": ("base",), "weights": "uniform"},
    ),
    Entry(
        "fisher",
        "robustsoup.soups.fisher:fisher",
        "Averages each weight by its Fisher information on attacked images.",
        source="Matena and Raffel 2022, arXiv:2111.09832",
        facts={"needs": "merging", "requires": ("data", "threat")},
    ),
    Entry(
        "regmean",
        "robustsoup.soups.regmean:regmean",
        "Fits the outputs of the ingredients' linear layers on attacked images.",
        source="Jin et al. 2022, arXiv:2212.09849",
        facts={"needs": "merging", "requires": ("data", "threat")},
    ),
    takes_functions=True,
)
"""A target is called as (n, step, max_soups) and returns a list of coefficients (n,), unless its
facts say what it "needs": "evaluations" of soups, "training", or "merging": the target is then
called with a robustsoup.soups.merging.Merge, for each list of weights.

Facts of merging: "requires", any of "base" (the checkpoint that the ingredients were fine-tuned
from), "data" (training samples to measure on), "threat" (one that is not clean) and "blocks" (names
of blocks); "ingredients", the number that the method takes; "weights", "uniform" if all ingredients
must weigh the same.
"""

BUFFER_POLICIES = Registry(
    "buffers",
    Entry(
        "base",
        "robustsoup.soups.buffers:copy_base",
        "Copy the statistics of one checkpoint: by default the common ancestor, else the first.",
        facts={"affine": True, "learning": "start"},
    ),
    Entry(
        "average",
        "robustsoup.soups.buffers:average",
        "Average the ingredients' statistics with their coefficients.",
        facts={"learning": "step"},
    ),
    Entry(
        "recalibrate",
        "robustsoup.soups.buffers:recalibrate_clean",
        "Measure the statistics again on training samples.",
        facts={"affine": True, "needs": ("data",)},
    ),
    Entry(
        "recalibrate-adversarial",
        "robustsoup.soups.buffers:recalibrate_adversarial",
        "Measure them on attacked training samples.",
        facts={"affine": True, "needs": ("data", "threat")},
    ),
    Entry(
        "tracked",
        "robustsoup.soups.buffers:take_tracked",
        "Take the statistics that learning tracked; learned soups only.",
        facts={"affine": True, "needs": ("tracked",), "learning": "train"},
    ),
    takes_functions=True,
)
"""A target takes an UnfinishedSoup and returns its Buffers (see robustsoup.soups.mixing).

facts: "needs", any of "data" (calibration samples), "threat" (one that is not clean) and "tracked"
(statistics from learning); "affine", whether coefficients may be negative; "learning", when the
statistics are computed again while a soup is learned: "start", "step", "epoch" (the default), or
"train" where the train-mode passes update them.
"""
