"""Every reader and parser of files and text that strangers write, each with a few seeds to mutate.

A seed has no digests or checksums where files of other programs need none, so that mutations get
past them.
"""

import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path

from all_formats import RECIPE, make_evaluation, save_plane, save_results, without_digests
from hostile_pickles import pickle, table, tensor, text, write_archive
from stored_files import FORMATS, describe, save_coefficients, save_dial, save_foreign, save_state

from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.cli.mixing import parse_coefficients
from robustsoup.diagnosis.landscape import Landscape
from robustsoup.documents import parse_json, parse_toml
from robustsoup.errors import CoefficientError
from robustsoup.evaluation.verdicts import Evaluation
from robustsoup.progress import SavedState
from robustsoup.recipes import load_recipe
from robustsoup.runs.results import Results
from robustsoup.soups.coefficients import load_coefficients
from robustsoup.soups.goal import Requirement, Score
from robustsoup.threats import ThreatModel
from robustsoup.training.objectives import Objective
from robustsoup.training.schedules import check_schedule


@dataclass(frozen=True)
class Reader:
    """What is fuzzed.

    Attributes:
        seeds: Function that returns valid inputs; it may write into a folder.
        read: Function of an input and a folder; it raises `refusals` for what it refuses.
        refusals: Errors that are no fault, beside RobustsoupError.
    """

    seeds: object
    read: object
    refusals: tuple[type[Exception], ...] = ()


def file_reader(name, read):
    """Return a function that writes an input to a file and reads that."""

    def write_and_read(content, folder):
        path = Path(folder) / name
        path.write_bytes(content)
        read(path)

    return write_and_read


def text_reader(parse):
    """Return a function that parses an input as text."""
    return lambda content, folder: parse(content.decode("utf-8", "replace"))


def seed_files(*savers):
    """Return a function that reads what some functions write, without digests."""

    def make_seeds(folder):
        paths = [save(Path(folder)) for save in savers]
        return [hide_digests(path.read_bytes(), path.suffix) for path in paths]

    return make_seeds


def hide_digests(content, suffix):
    """Return a file as another program would write it."""
    if suffix == ".json":
        return without_digests(content)
    return content.replace(b"robustsoup.digests", b"another.programme!")


def seed_pickles(folder):
    """Return the pickles of a state and of a hand-made archive."""
    seeds = []
    for save in (save_state, save_foreign):
        with zipfile.ZipFile(save(Path(folder))) as archive:
            name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
            seeds.append(archive.read(name))
    return [*seeds, pickle(table((text("w"), tensor([4], [1]))))]


def read_pickle(content, folder):
    """Read a pickle in an archive whose checksums are right."""
    path = write_archive(Path(folder) / "a.pth", content)
    read = Checkpoint.load(path)
    describe([dict(read.tensors), read.provenance])


def seed_evaluations(folder):
    """Return the JSON of an evaluation, whose arrays stay in the folder."""
    path = make_evaluation().save(Path(folder) / "e.json")
    return [without_digests(path.read_bytes())]


def seed_arrays(folder):
    """Return the bytes of two arrays, as numpy writes them."""
    path = make_evaluation().save(Path(folder) / "e.json")
    with zipfile.ZipFile(path.with_suffix(".npz")) as archive:
        return [archive.read("ids.npy"), archive.read("robust_0.npy")]


def read_array(content, folder):
    """Read an evaluation one of whose arrays is the input, with the right checksum."""
    path = Path(folder) / "e.npz"
    with zipfile.ZipFile(path, "r") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    changed = Path(folder) / "f.npz"
    with zipfile.ZipFile(changed, "w") as archive:
        for name, whole in (members | {"ids.npy": content}).items():
            archive.writestr(name, whole)
    json_path = path.with_suffix(".json")
    changed.with_suffix(".json").write_bytes(without_digests(json_path.read_bytes()))
    read_evaluation(changed.with_suffix(".json"))


def read_evaluation(path):
    """Read an evaluation and everything that it derives."""
    read = Evaluation.load(path)
    read.to_json(), read.warnings, read.hits()


def read_coefficients(path):
    """Read coefficients, or else a dial."""
    try:
        load_coefficients(path)
    except CoefficientError:
        load_coefficients(path, 0.5)


def parse_objective(text):
    """Parse an objective, but no path of code, which the user's own code may be."""
    return Objective.parse(text.replace(":", ""))


def seed_headers(folder):
    """Return a .safetensors file with one small tensor."""
    header = b'{"w":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}}'
    return [struct.pack("<Q", len(header)) + header + bytes(16)]


def load_set(content, folder):
    """Read a recipe with the input as `--set`."""
    path = Path(folder) / "r.toml"
    path.write_text(RECIPE, encoding="utf-8")
    load_recipe(path, [content.decode("utf-8", "replace")])


def encode(*texts):
    """Return a function that returns these texts as bytes."""
    return lambda folder: [text.encode() for text in texts]


def read_checkpoint(path):
    """Read a checkpoint in both ways, and everything that they hold."""
    for read in (Checkpoint.load, Checkpoint.open):
        checkpoint = read(path)
        describe([dict(checkpoint.tensors), checkpoint.provenance])
        _ = checkpoint.parameters, checkpoint.tied, checkpoint.digest


READERS = {
    ".safetensors": Reader(
        lambda folder: seed_headers(folder) + seed_files(FORMATS["checkpoint"][0])(folder),
        file_reader("a.safetensors", read_checkpoint),
    ),
    ".pth": Reader(seed_files(save_foreign), file_reader("a.pth", read_checkpoint)),
    "pickle in a .pth": Reader(seed_pickles, read_pickle),
    "coefficients": Reader(
        seed_files(save_coefficients, save_dial),
        file_reader("c.safetensors", read_coefficients),
    ),
    "state": Reader(
        seed_files(save_state), file_reader("s.pt", lambda path: SavedState(path, "work").load())
    ),
    "evaluation": Reader(seed_evaluations, file_reader("e.json", read_evaluation)),
    "array of an evaluation": Reader(seed_arrays, read_array),
    "results.json": Reader(
        seed_files(save_results),
        file_reader("results.json", lambda path: Results.load(path).to_json()),
    ),
    "plane": Reader(seed_files(save_plane), file_reader("p.json", Landscape.load)),
    "recipe": Reader(
        encode(RECIPE), file_reader("r.toml", lambda path: load_recipe(path).to_toml())
    ),
    "--set": Reader(encode("evaluate.steps=2", 'select.require=["clean>=0.5"]'), load_set),
    "JSON": Reader(
        encode('{"a": [1, 2.5e3, true, null, "\\u00e9"]}'),
        lambda content, folder: parse_json(content),
        (ValueError,),
    ),
    "TOML": Reader(
        encode('[a.b]\nc = [1, 2.5, true, "x", 1979-05-27]\n'),
        lambda content, folder: parse_toml(content),
        (ValueError,),
    ),
    "threat": Reader(encode("Linf 8/255", "L2 0.5", "clean"), text_reader(ThreatModel.parse)),
    "requirement": Reader(
        encode("clean>=0.85", "Linf 8/255 >= 40%"), text_reader(Requirement.parse)
    ),
    "score": Reader(encode("0.3 clean + 0.7 Linf 8/255"), text_reader(Score.parse)),
    "objective": Reader(encode("mixed 0.3", "trades 6", "ce"), text_reader(parse_objective)),
    "schedule": Reader(encode("one-cycle 0.3", "cosine"), text_reader(check_schedule)),
    "--coefficients": Reader(
        encode("1/3,1/3,1/3", "0.5,0.5"),
        text_reader(lambda words: parse_coefficients(words, 3, None)),
    ),
}  # fmt: skip
