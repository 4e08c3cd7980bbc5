"""The model card: what it says, and that names of strangers are only text in it."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from markdown_it import MarkdownIt
from synthetic_results import NAMES, make_results

from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.evaluation.intervals import Accuracy
from robustsoup.evaluation.verdicts import Evaluation
from robustsoup.printable import make_printable
from robustsoup.reports.card import (
    CARD,
    Card,
    find_card,
    is_own_card,
    list_sources,
    make_card,
    render_card,
    write_card,
    write_run_card,
)
from robustsoup.reports.markup import escape_markdown, quote_code
from robustsoup.runs.description import Ancestor, StoredEvaluation, describe_checkpoint
from robustsoup.runs.results import Results
from robustsoup.soups.mixing import mix

HOSTILE = (
    "<script>alert(1)</script>",
    "![x](http://hostile.invalid/i.png) [y](javascript:alert(1)) <http://hostile.invalid>",
    "http://hostile.invalid www.hostile.invalid me@hostile.invalid",
    "a | b | c",
    "`` ` ``` code",
    "# heading\n- list\n\n---\nlicense: mit\n---\n<b>bold</b>",
    "*emphasis* __strong__ ~~gone~~ &lt; &#60; \\< $x$",
    '": {"x": 1}, \'[!',
    "\x1b[31m\u202e\ud800 ends",
    "<!-- comment --> <details open ontoggle=alert(1)>",
)


def read_header(text):
    yaml = pytest.importorskip("yaml")
    assert text.startswith("---\n")
    return yaml.safe_load(text.split("\n---\n")[0])


def make(name="plain", accuracy=None):
    """Make a card whose every text is `name`."""
    parents = [Ancestor(name, "1" * 64, 0.25, name), Ancestor(name, "2" * 64, 0.75, name)]
    tree = Ancestor(name, "0" * 64, None, name, tuple(parents))
    scores = accuracy or {"clean": Accuracy(9, 10), name: Accuracy(4, 10)}
    stored = StoredEvaluation(Path("a.json"), name, name, name, scores, (name,), (name,))
    return Card(
        title=name,
        file=f"{name}.safetensors",
        network=name,
        tree=tree,
        evaluations=(stored,),
        choice=(name,),
        warnings=(name,),
        sources=(name,),
        versions={"torch": name},
    )


def test_the_header_holds_the_measured_figures():
    header = read_header(render_card(make("Linf 8/255")))
    (model,) = header["model-index"]
    (result,) = model["results"]
    clean, robust = result["metrics"]
    assert (clean["name"], clean["value"]) == ("clean accuracy", 0.9)
    assert (robust["args"]["hits"], robust["args"]["n"]) == (4, 10)
    accuracy = Accuracy(4, 10)
    assert (robust["args"]["low"], robust["args"]["high"]) == (accuracy.low, accuracy.high)
    assert "license" not in header


def test_natural_shift_is_no_attack():
    accuracy = {"clean": Accuracy(9, 10), "shift": Accuracy(7, 10)}
    header = read_header(render_card(make(accuracy=accuracy)))
    metrics = header["model-index"][0]["results"][0]["metrics"]
    assert [item["name"] for item in metrics] == [
        "clean accuracy",
        "clean accuracy under natural shift",
    ]


@pytest.mark.parametrize("count", [1, 2])
def test_only_ingredients_with_a_share_count(count):
    card = make()
    unused = dataclasses.replace(card.tree.parents[0], coefficient=0.0)
    parents = (*card.tree.parents[:count], unused)
    tree = dataclasses.replace(card.tree, parents=parents)
    text = render_card(dataclasses.replace(card, tree=tree))
    assert ("base_model_relation" in read_header(text)) == (count > 1)
    assert ("mixed from 2 fine-tuned checkpoints" in text) == (count > 1)


def test_sources_are_those_of_the_soup(tmp_path):
    content = make_results(tmp_path)
    places = {name: {"checkpoint": f"hf://org/{name}/a.safetensors"} for name in NAMES}
    content["recipe"] |= {"ingredients": places, "checkpoint": "hf://org/base/a.safetensors"}
    results = Results.from_json(content, "results.json")
    row = next(row for row in results.rows if row.coefficients == (0.4, 0.0, 0.6))
    assert list_sources(results, row) == ("org/eps4", "org/eps16")
    learned = next(row for row in results.rows if row.role == "learned")
    assert list_sources(results, learned) == ("org/eps4", "org/eps8", "org/eps16")
    of_base = dataclasses.replace(row, ingredients=("pretrained", "eps8"), coefficients=(0.5, 0.5))
    assert list_sources(results, of_base) == ("org/base", "org/eps8")


@pytest.mark.parametrize("name", HOSTILE)
def test_names_of_strangers_are_only_text(name):
    text = render_card(make(name))
    header = read_header(text)
    assert set(header) == {
        "library_name",
        "pipeline_tag",
        "tags",
        "base_model",
        "base_model_relation",
        "model-index",
    }
    assert header["model-index"][0]["name"] == make_printable(name)
    body = text.split("\n---\n", 1)[1]
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(body)
    found = [token for block in tokens for token in (block, *(block.children or ()))]
    kinds = [token.type for token in found]
    # A renderer that does not know headers shows them too.
    whole = MarkdownIt("commonmark", {"html": True}).parse(text)
    in_all = [token for block in whole for token in (block, *(block.children or ()))]
    assert not {"image", "link_open", "html_inline"} & {token.type for token in in_all}
    assert sum(token.type == "html_block" for token in in_all) == 1
    html = [token.content for token in found if token.type.startswith("html")]
    assert [item.startswith("<!-- robustsoup card") for item in html] == [True]
    assert not {"image", "link_open", "em_open", "strong_open"} & set(kinds)
    headings = [
        found[number + 1].content
        for number, token in enumerate(found)
        if token.type == "heading_open" and token.tag == "h2"
    ]
    assert headings == [
        "Choice",
        "Ingredients",
        "Results",
        "Masking check",
        "Warnings",
        "Limits",
        "Use",
        "Licence",
    ]
    plain = MarkdownIt("commonmark").enable("table").parse(render_card(make()).split("---\n", 2)[2])
    assert kinds.count("td_open") == sum(token.type == "td_open" for token in plain)


@pytest.mark.parametrize("name", HOSTILE)
def test_escaped_text_reads_as_it_was(name):
    shown = make_printable(name)
    render = MarkdownIt("commonmark", {"html": True})
    (paragraph,) = [t for t in render.parse(f"x {escape_markdown(name)} x") if t.children]
    assert "".join(token.content for token in paragraph.children) == f"x {shown} x"
    (paragraph,) = [t for t in render.parse(f"x {quote_code(name)} x") if t.children]
    codes = [token.content for token in paragraph.children if token.type == "code_inline"]
    assert codes == [shown.replace("|", "\\|")]


def test_an_edited_card_stays(tmp_path):
    card = make()
    assert write_card(card, tmp_path) is None
    first = (tmp_path / CARD).read_text(encoding="utf-8")
    other = dataclasses.replace(card, title="other")
    assert write_card(other, tmp_path) is None
    assert "# other" in (tmp_path / CARD).read_text(encoding="utf-8")
    edited = first.replace("---\n", "---\nlicense: mit\n", 1)
    (tmp_path / CARD).write_text(edited, encoding="utf-8")
    assert not is_own_card(tmp_path / CARD)
    assert "was edited" in write_card(other, tmp_path)
    assert (tmp_path / CARD).read_text(encoding="utf-8") == edited


def test_the_card_of_a_checkpoint_without_a_record(tmp_path):
    file = Checkpoint({"w": torch.ones(2)}).save(tmp_path / "w.pth")
    text = render_card(make_card(describe_checkpoint(file)))
    assert "model-index" not in read_header(text)
    assert "were not evaluated" in text
    assert str(tmp_path) not in text


def test_the_card_of_a_soup_is_not_that_of_its_ingredient(tmp_path):
    parts = [Checkpoint({"w": torch.full((2,), float(i))}) for i in range(2)]
    files = [part.save(tmp_path / f"{i}.safetensors") for i, part in enumerate(parts)]
    soup = mix(files, [0.5, 0.5]).save(tmp_path / "soup.safetensors")
    write_card(make_card(describe_checkpoint(soup)), tmp_path)
    assert find_card(soup, Checkpoint.load(soup).digest) == tmp_path / CARD
    assert parts[0].digest in (tmp_path / CARD).read_text(encoding="utf-8")
    assert find_card(files[0], parts[0].digest) is None


def test_json_of_others_beside_a_checkpoint_is_no_evaluation(tmp_path):
    file = Checkpoint({"w": torch.ones(2)}).save(tmp_path / "w.pth")
    for name, content in (("a", {"checkpoint": {"epoch": 3}}), ("b", ["checkpoint"])):
        (tmp_path / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
        (tmp_path / f"{name}.npz").write_bytes(b"")
    assert describe_checkpoint(file).evaluations == ()


@pytest.fixture
def run_with_a_soup_under_other_names(tmp_path):
    """The folder of a run whose soup.pth names its tensors otherwise than the network does."""
    content = make_results(tmp_path)
    content["soup"] = "soup.pth"
    row = next(row for row in content["rows"] if row["name"] == content["selection"]["chosen"])
    row["name"] = content["selection"]["chosen"] = "learned"
    row["checkpoint"] = "checkpoints/learned.safetensors"
    (tmp_path / "results.json").write_text(json.dumps(content), encoding="utf-8")
    for name in ("checkpoints", "evaluations"):
        (tmp_path / name).mkdir(exist_ok=True)
    own = Checkpoint({"w": torch.ones(2), "b": torch.zeros(2)})
    own.save(tmp_path / row["checkpoint"])
    torch.save({f"backbone.{name}": t for name, t in own.tensors.items()}, tmp_path / "soup.pth")
    ids = torch.arange(4)
    record = {"split": "test", "checkpoint": own.digest, "threats": [], "broken_by": ["clean"]}
    evaluation = Evaluation(ids, ids, ids, torch.ones(4), {}, record)
    evaluation.save(tmp_path / "evaluations" / "learned.test.json")
    return tmp_path


def test_a_soup_under_other_names_has_the_card_of_its_run(run_with_a_soup_under_other_names):
    folder = run_with_a_soup_under_other_names
    soup = folder / "soup.pth"
    assert write_run_card(Results.load(folder / "results.json"), folder) is None
    assert find_card(soup, Checkpoint.load(soup).digest) == folder / CARD
    assert "under the names in `soup.pth`" in (folder / CARD).read_text(encoding="utf-8")


def test_a_soup_under_other_names_has_the_evaluations_of_its_run(
    run_with_a_soup_under_other_names,
):
    soup = run_with_a_soup_under_other_names / "soup.pth"
    (stored,) = describe_checkpoint(soup).evaluations
    assert stored.path.name == "learned.test.json"
    torch.save({"backbone.w": torch.ones(2), "backbone.b": torch.ones(2)}, soup)
    assert describe_checkpoint(soup).evaluations == ()


@pytest.mark.parametrize(
    ("network", "arguments"),
    [
        ({"spec": "resnet9:width=2", "classes": 10, "channels": 3}, ""),
        ({"spec": "my_net:load", "classes": 10, "channels": 3}, '"my_net:load"'),
        ({"spec": "hf:vit"}, '"hf:vit"'),
        ({"spec": "robustbench:cifar10/Linf/X"}, '"robustbench:cifar10/Linf/X"'),
        (None, '"package.module:factory"'),
    ],
)
def test_the_code_of_a_card_names_the_network_that_a_file_cannot_name(tmp_path, network, arguments):
    record = {} if network is None else {"network": network}
    file = Checkpoint({"w": torch.ones(2)}, record).save(tmp_path / "w.safetensors")
    text = render_card(make_card(describe_checkpoint(file)))
    assert f'rs.Checkpoint.load("w.safetensors").network({arguments})\n' in text


@pytest.mark.extras
def test_the_hub_reads_the_card(tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    card = hub.ModelCard(render_card(make("Linf 8/255")), ignore_metadata_errors=False)
    clean, robust = card.data.eval_results
    assert (clean.metric_value, robust.metric_value) == (0.9, 0.4)
    assert robust.metric_args["n"] == 10
    assert (robust.dataset_type, robust.dataset_split) == ("Linf 8/255", "Linf 8/255")
    assert card.data.pipeline_tag == "image-classification"
    for name in HOSTILE:
        read = hub.ModelCard(render_card(make(name)), ignore_metadata_errors=False)
        assert read.data.model_name == make_printable(name)
        assert read.data.license is None
