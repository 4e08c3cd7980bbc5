"""One small file of every format, and a reader that returns all its values."""

import importlib.util
import json

import torch
from stored_files import FORMATS, describe
from synthetic_results import make_results
from torchvision_operators import declare_operators

from robustsoup.diagnosis.landscape import Landscape
from robustsoup.evaluation.verdicts import Evaluation, Verdicts
from robustsoup.models import NetworkSettings, build_network
from robustsoup.recipes import load_recipe
from robustsoup.runs.results import Results
from robustsoup.runs.store import RECORD, Store

KEY = "ab" * 32
RECIPE = """
name = "eps"
data = "digits"
model = "resnet9:width=2"

[pretrain]
threat = "Linf 32/255"
epochs = 2
lr = 0.2

[ingredients]
low = { threat = "Linf 16/255", epochs = 1 }
high = { threat = "Linf 64/255", epochs = 1 }

[soups.grid]
method = "grid"
step = 0.5

[evaluate]
threats = ["Linf 32/255", "L2 0.5"]
steps = 2

[select]
require = ["clean>=0.5"]
"""


def make_evaluation(count=40):
    """Make an evaluation of random verdicts, with kept points."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (count,), generator=generator)
    robust = torch.rand(count, generator=generator) > 0.5
    by = torch.where(robust, -1, 1)
    margin = torch.randn(count, generator=generator)
    points = torch.rand(count, 1, 3, 3, generator=generator)
    verdicts = Verdicts(robust, by, by.clone(), margin.abs(), margin, points)
    record = {
        "threats": ["Linf 32/255"],
        "broken_by": ["clean", "apgd"],
        "warnings": ["the logits are small"],
        "steps": 5,
        "seconds": 1.5,
    }
    threats = {"Linf 32/255": verdicts}
    return Evaluation(torch.arange(count), labels, labels.clone(), margin, threats, record)


def evaluation_saver(suffix):
    """Return a function that writes an evaluation and returns the file with this suffix."""
    return lambda folder: make_evaluation().save(folder / "e.json").with_suffix(suffix)


def read_evaluation(path):
    """Read the evaluation that a file is a part of."""
    read = Evaluation.load(path.with_name("e.json"))
    verdicts = {name: vars(item) for name, item in read.threats.items()}
    return describe([read.ids, read.labels, read.prediction, read.margin, verdicts, read.to_json()])


def save_results(folder):
    """Write the results of a run."""
    Results.from_json(make_results(folder), "results").save(folder / "results.json")
    return folder / "results.json"


def save_plane(folder):
    """Write a plane of losses."""
    maps = torch.rand(4, 3, 3, generator=torch.Generator().manual_seed(0)).tolist()
    names = ("loss", "accuracy", "clean_loss", "clean_accuracy")
    axis = (-0.25, 0.25, 1.0)
    return Landscape(
        checkpoints=("a", "b", "c"),
        x=axis,
        y=axis,
        positions=((0.0, 0.0), (0.5, 0.5), (1.0, 0.0)),
        **dict(zip(names, maps, strict=True)),
        threat="Linf 32/255",
        attack_steps=2,
        samples=64,
        split="val",
        buffers="recalibrate",
        seed=3,
        precision="float32",
    ).save(folder / "plane.json")


def save_recipe(folder):
    """Write a recipe."""
    (folder / "recipe.toml").write_text(RECIPE, encoding="utf-8")
    return folder / "recipe.toml"


def save_step(name):
    """Return a function that writes a finished step and returns one of its files."""

    def save(folder):
        store = Store(folder / "store")
        with store.write_step(KEY, {"kind": "evaluate", "seconds": 1.0}, notice=print) as step:
            make_evaluation().save(step / "e.json")
        return store.path(KEY) / name

    return save


def read_step(path):
    """Return the files of a step that the store hands out, None if it says to repeat the step."""
    store = Store(path.parents[2])
    if not store.has(KEY):
        return None
    contents = [store.file(KEY, name).read_bytes() for name in ("e.json", "e.npz")]
    return describe([dict(store.record(KEY)), contents])


ALL_FORMATS = FORMATS | {
    "evaluation": (evaluation_saver(".json"), read_evaluation),
    "arrays of an evaluation": (evaluation_saver(".npz"), read_evaluation),
    "points of an evaluation": (evaluation_saver(".points.npz"), read_evaluation),
    "results.json": (save_results, lambda path: describe(Results.load(path).to_json())),
    "plane": (save_plane, lambda path: describe(vars(Landscape.load(path)))),
    "record of a stored step": (save_step(RECORD), read_step),
    "file of a stored step": (save_step("e.npz"), read_step),
    "recipe": (save_recipe, lambda path: load_recipe(path).to_toml()),
}
"""kind -> (function that writes files into a folder and returns the one to damage, reader)."""


CONFIGURATION = {
    "model_type": "vit",
    "image_size": 8,
    "patch_size": 4,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
}


def save_configuration(folder):
    """Write the configuration of a small network of transformers."""
    (folder / "config.json").write_text(json.dumps(CONFIGURATION), encoding="utf-8")
    return folder / "config.json"


def read_configuration(path):
    """Build the network that a configuration describes."""
    declare_operators()
    return build_network(NetworkSettings(f"hf:{path.parent}", classes=10, channels=3))


READ_FORMATS = dict(ALL_FORMATS)
"""All formats, and those of other programs that hold no weights."""
if importlib.util.find_spec("transformers"):
    READ_FORMATS["configuration of transformers"] = (save_configuration, read_configuration)


def without_digests(content):
    """Return the JSON of a file as another program would write it, without stamp and digests."""
    table = json.loads(content)
    own = ("digest", "digests", "format", "robustsoup")
    return json.dumps({key: value for key, value in table.items() if key not in own}).encode()
