"""Networks of timm, transformers, torchvision and robustbench, with the real libraries."""

import dataclasses
import hashlib
import http.server
import json
import shutil
import threading
from typing import ClassVar

import pytest
import torch
from ingredients import perturbed
from network_watch import refused_network
from torch import nn

from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.cli import main
from robustsoup.cli.inputs import load_requested_data, make_context
from robustsoup.cli.options import DataOptions, NetworkOptions, RunOptions
from robustsoup.data import load_data
from robustsoup.errors import ModelError
from robustsoup.evaluation.evaluate import evaluate
from robustsoup.models import (
    NetworkSettings,
    build_skeleton,
    default_image_size,
    factory_fingerprint,
    is_built_in,
    load_model,
    transformers_networks,
)
from robustsoup.models.normalize import normalize_inputs
from robustsoup.soups.learning import learn
from robustsoup.soups.mixing import mix
from robustsoup.threats import ThreatModel
from robustsoup.tracking import track

LINF = ThreatModel("Linf", 16 / 255)
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALVES = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 1,
}
CONVNEXT = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "patch_size": 2}
PROCESSOR = {
    "do_normalize": True,
    "image_mean": [0.4],
    "image_std": [0.2],
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "resample": 3,
    "size": {"height": 8, "width": 8},
}


def write_folder(folder, kind="vit", processor=PROCESSOR, **changed):
    """Write a folder as transformers' save_pretrained does, without weights."""
    from transformers import AutoConfig

    base = {"vit": VIT, "convnext": CONVNEXT | {"num_channels": 1}}.get(kind, {})
    AutoConfig.for_model(kind, **(base | {"num_labels": 10} | changed)).save_pretrained(folder)
    if processor:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return f"hf:{folder}"


def write_changed_folder(folder, changes):
    """Write a folder of transformers, and change its configuration as its library would not."""
    spec = write_folder(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return spec


def enlarge(split, side):
    """Repeat the pixels of digits until images have this many a side."""
    factor = side // 8
    images = split.images.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    return dataclasses.replace(split, images=images)


@pytest.fixture(scope="module")
def specs(tmp_path_factory):
    """One small network of each library, for digits (one channel, 8 x 8 pixels)."""
    return {
        "timm vit": "timm:test_vit:img_size=8,patch_size=4",
        "timm convnext": "timm:test_convnext",
        "timm without norm": "timm:test_nfnet",
        "timm groupnorm": "timm:test_efficientnet_gn",
        "timm layernorm": "timm:test_efficientnet_ln",
        "hf vit": write_folder(tmp_path_factory.mktemp("vit")),
        "hf convnext": write_folder(tmp_path_factory.mktemp("convnext"), "convnext"),
    }


KINDS = (
    "timm vit",
    "timm convnext",
    "timm without norm",
    "timm groupnorm",
    "timm layernorm",
    "hf vit",
    "hf convnext",
)


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_is_mixed_learned_and_evaluated(kind, specs, tmp_path):
    data = load_data("digits")
    model = load_model(specs[kind], channels=1)
    items = [perturbed(model, seed, 0.02) for seed in (1, 2)]
    soup = mix(items, [0.25, 0.75])
    for name, tensor in soup.tensors.items():
        if tensor.is_floating_point():
            first, second = (item.tensors[name].double() for item in items)
            torch.testing.assert_close(
                tensor.double(), 0.25 * first + 0.75 * second, rtol=1e-6, atol=1e-6
            )
    path = soup.save(tmp_path / "soup.safetensors")
    network = load_model(specs[kind], channels=1)
    Checkpoint.load(path).load_into(network)
    side = network.input_settings.size[0] if "vit" in kind else 32
    result = evaluate(network, enlarge(data.test.first(8), side), [LINF], steps=2, device="cpu")
    assert len(result.prediction) == 8
    learned = learn(
        items,
        enlarge(data.train.first(32), side),
        threat=LINF,
        epochs=1,
        batch_size=16,
        device="cpu",
    )
    assert mix(items, learned).tensors.keys() == soup.tensors.keys()


def test_a_network_with_tied_weights_keeps_them_tied(specs):
    model = load_model(specs["hf vit"], channels=1)
    layers = model.vit.layers
    layers[1].mlp = layers[0].mlp
    items = [perturbed(model, seed, 0.02) for seed in (1, 2)]
    soup = mix(items, [0.5, 0.5])
    assert len(soup.tied) == 4
    for alias, name in soup.tied.items():
        assert torch.equal(soup.tensors[alias], soup.tensors[name])


@pytest.mark.parametrize(
    ("spec", "settings"),
    [
        ("timm:test_resnet", ((160, 160), HALVES, "bilinear")),
        ("timm:resnet18.a1_in1k", ((224, 224), IMAGENET, "bicubic")),
        ("timm:test_vit:img_size=32", ((32, 32), HALVES, "bicubic")),
        ("torchvision:resnet18", ((224, 224), IMAGENET, "bilinear")),
        ("torchvision:convnext_tiny", ((224, 224), IMAGENET, "bilinear")),
    ],
)
def test_input_settings_are_those_of_the_library(spec, settings):
    model = load_model(spec)
    inputs = model.input_settings
    assert (inputs.size, inputs.normalize, inputs.interpolation) == settings
    assert model.network_settings == NetworkSettings(spec, normalize=settings[1])
    if spec.startswith("torchvision"):
        assert inputs.class_names[:2] == ("tench", "goldfish")


def test_constants_are_applied_inside_and_can_be_overridden():
    import timm

    x = torch.rand(2, 3, 160, 160)
    plain = timm.create_model("test_vit", num_classes=10).eval()
    expected = plain((x - 0.5) / 0.5)
    model = load_model("timm:test_vit")
    model.load_state_dict(plain.state_dict())
    torch.testing.assert_close(model.eval()(x), expected)
    own = load_model("timm:test_vit", normalize=((0.0,) * 3, (1.0,) * 3))
    own.load_state_dict(plain.state_dict())
    assert torch.equal(own.eval()(x), plain(x))
    assert own.network_settings.normalize == ((0.0,) * 3, (1.0,) * 3)


def test_a_folder_of_transformers_is_read(tmp_path):
    from transformers import AutoModelForImageClassification

    names = {number: f"class {number}" for number in range(10)}
    spec = write_folder(tmp_path, id2label=names, label2id={v: k for k, v in names.items()})
    model = load_model(spec, channels=1)
    assert model.input_settings.size == (8, 8)
    assert model.input_settings.interpolation == "bicubic"
    assert model.input_settings.class_names == tuple(names.values())
    assert model.network_settings.normalize == ((0.4,), (0.2,))
    model.save_pretrained(tmp_path / "saved")
    theirs = AutoModelForImageClassification.from_pretrained(tmp_path / "saved").eval()
    x = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(model.eval()(x), theirs((x - 0.4) / 0.2).logits)
    rebuilt = load_model(spec, channels=1)
    Checkpoint.load(tmp_path / "saved" / "model.safetensors").load_into(rebuilt)
    assert torch.equal(rebuilt.eval()(x), model(x))


def test_files_of_save_pretrained_become_one_that_from_pretrained_loads(tmp_path):
    """save_pretrained gives tensors other names than the network has, since version 5."""
    from transformers import AutoModelForImageClassification

    spec = write_folder(tmp_path / "first")
    files = []
    for seed, name in enumerate(("first", "second")):
        model = load_model(spec, channels=1, seed=seed)
        model.save_pretrained(tmp_path / name)
        files.append(str(tmp_path / name / "model.safetensors"))
    for named in ([], ["--model", spec, "--data", "digits"]):
        with pytest.raises(SystemExit) as end:
            main(["mix", *files, *named, "-o", files[0].replace("first", "soup")])
        assert end.value.code == 0
        shutil.copy(tmp_path / "first" / "config.json", tmp_path / "soup")
        soup, first, second = (
            AutoModelForImageClassification.from_pretrained(tmp_path / name).state_dict()
            for name in ("soup", "first", "second")
        )
        for key, tensor in soup.items():
            torch.testing.assert_close(tensor, (first[key] + second[key]) / 2)


@pytest.mark.parametrize(
    ("changed", "constants"),
    [
        ({"do_normalize": False}, None),
        ({"rescale_factor": 1 / 127.5, "rescale_offset": True, "do_normalize": False}, (0.5, 0.5)),
        ({"do_rescale": False, "image_mean": [127.5], "image_std": [51.0]}, (0.5, 0.2)),
        ({"include_top": True}, (0.4, 0.04)),
        ({"include_top": True, "do_normalize": False}, (0.0, 0.2)),
        ({"include_top": True, "rescale_offset": True, "rescale_factor": 1 / 127.5}, (0.7, 0.02)),
    ],
)
def test_constants_are_those_of_the_image_processor(tmp_path, changed, constants):
    model = load_model(write_folder(tmp_path, processor=PROCESSOR | changed), channels=1)
    normalize = model.network_settings.normalize
    if constants is None:
        assert normalize is None
    else:
        assert [part[0] for part in normalize] == pytest.approx(constants)


def test_classes_channels_and_options_reach_a_folder(tmp_path):
    spec = write_folder(tmp_path) + ":image_size=16"
    model = load_model(spec, classes=4, channels=3)
    assert model(torch.rand(2, 3, 16, 16)).shape == (2, 4)
    with pytest.raises(ModelError, match="its configuration has no img_size"):
        load_model(f"hf:{tmp_path}:img_size=16")


@pytest.mark.parametrize("source", ["timm:resnet18", "torchvision:resnet18"])
def test_a_record_may_name_what_the_library_lists(tmp_path, source):
    path = Checkpoint.of(load_model(source)).save(tmp_path / "a.safetensors")
    network = Checkpoint.load(path).network()
    assert network.network_settings.spec == source
    assert network.network_settings.normalize == IMAGENET


@pytest.mark.parametrize(
    "spec",
    [
        "timm:no_such_network",
        "timm:hf_hub:timm/resnet18",
        "timm:hf-hub:timm/resnet18:width=1",
        "timm:local-dir:/tmp",
        "timm:resnet18:pretrained=1",
        "timm:resnet18:checkpoint_path=evil.pth",
        "timm:resnet18:act_layer=relu",
        "timm:vit_tiny_patch16_224:depth=100000",
        "torchvision:resnet18:weights=DEFAULT",
        "torchvision:fasterrcnn_resnet50_fpn",
        "robustbench:Carmon2019Unlabeled",
        "hf:somebody/network",
        "timm",
        "timm:resnet18:width=1,width=1",
    ],
)
def test_a_record_may_name_nothing_else(spec):
    assert not is_built_in(spec)


def test_a_recorded_folder_is_not_opened(tmp_path):
    model = load_model(write_folder(tmp_path), channels=1)
    path = Checkpoint.of(model).save(tmp_path / "a.safetensors")
    with pytest.raises(ModelError, match="files never choose code that runs"):
        Checkpoint.load(path).network()
    named = Checkpoint.load(path).with_network(f"hf:{tmp_path}")
    assert named.network()(torch.rand(1, 1, 8, 8)).shape == (1, 10)


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("timm:resnet81", 'timm lists no network "resnet81"; did you mean "resnet'),
        ("timm:hf-hub:timm/resnet18", 'timm lists no network "hf-hub:timm/resnet18"'),
        ("timm:resnet18:pretrained=1", "the option pretrained is not taken"),
        ("timm:resnet18:no_such=1", "cannot be built: "),
        ("timm:", "got no name, expected timm:NAME"),
        ("torchvision:resnet81", 'torchvision lists no network "resnet81"; did you mean'),
        ("torchvision:resnet18:weights=DEFAULT", "the option weights is not taken"),
        ("robustbench:Carmon2019Unlabelled", 'did you mean "cifar10/Linf/Carmon2019Unlabeled"?'),
        ("robustbench:Carmon2019Unlabeled:width=1", "takes no options, got width"),
        ("hf:no/such/folder", "there is no such folder, and a repository is named ORG/NAME"),
        ("hf:./absent", "there is no such folder"),
    ],
)
def test_a_wrong_name_is_one_line(spec, text):
    with pytest.raises(ModelError) as caught:
        load_model(spec)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "has no config.json"),
        ("{", "config.json: "),
        ("[]", "config.json: got list, expected an object"),
        ('{"architecture": "resnet18"}', "name a network of timm as timm:NAME"),
        ('{"model_type": "gpt2"}', "cannot be built: "),
        ('{"model_type": "no_such"}', "cannot be built: "),
        ('{"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}', "cannot be built: "),
    ],
)
def test_a_wrong_folder_is_one_line_and_runs_no_code(tmp_path, content, text):
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError) as caught:
        load_model(f"hf:{tmp_path}")
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"hidden_size": 10**9}, "hidden_size: got 1e+09, expected at most 1,000,000"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers: got 1000000, expected at most 1,000"),
        ({"depths": [2, 5000]}, "depths: got 5000, expected at most 1,000"),
        ({"nested": {"size": -(10**7)}}, "size: got -10000000, expected at most 1,000,000"),
        ({"hidden_size": 65_536, "intermediate_size": 65_536}, "more than 2,147,483,648 weights"),
        ({"image_size": 1_000_000}, "more than 2,147,483,648 weights"),
        ({"id2label": dict.fromkeys(map(str, range(50_001)))}, "expected at most 50,000"),
        *(
            ({key: "kernels-community/flash-attn"}, "expected eager or sdpa")
            for key in ("_attn_implementation", "attn_implementation")
        ),
        ({"attn_implementation": {"": "someone/kernel"}}, "expected eager or sdpa"),
        ({"use_kernels": True}, "asks for use_kernels"),
        ({"quantization_config": {"quant_method": "gptq"}}, "asks for quantization_config"),
        ({"model_type": "timm_wrapper", "architecture": "hf_hub:a/b"}, "asks for architecture"),
        ({"use_pretrained_backbone": True, "backbone": "a/b"}, "asks for use_pretrained_backbone"),
        ({"torch_dtype": "os.system"}, "cannot be built: "),
    ],
)
def test_a_configuration_may_only_describe_a_network_of_a_bounded_size(tmp_path, changes, text):
    with refused_network() as attempts, pytest.raises(ModelError) as caught:
        load_model(write_changed_folder(tmp_path, changes), channels=1)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)
    assert attempts == []


def test_a_configuration_may_not_describe_too_many_modules(tmp_path, monkeypatch):
    monkeypatch.setattr(transformers_networks, "MOST_MODULES", 20)
    with pytest.raises(ModelError, match="has more than 20 modules, the most that are built"):
        load_model(write_folder(tmp_path), channels=1)


def test_the_type_and_the_code_that_a_configuration_names_are_not_used(tmp_path):
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    names = {"AutoConfig": "own.Own", "AutoModelForImageClassification": "own.Own"}
    spec = write_changed_folder(tmp_path, {"auto_map": names, "dtype": "float16"})
    model = load_model(spec, channels=1)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert not (tmp_path / "ran").exists()


def test_fingerprints_hold_versions_and_the_configuration(tmp_path):
    import timm

    assert factory_fingerprint("timm:test_vit") == f"timm {timm.__version__}"
    before = factory_fingerprint(write_folder(tmp_path))
    assert before != factory_fingerprint(write_folder(tmp_path, num_hidden_layers=3))


def test_torchvision_networks_return_logits_in_train_mode():
    model = load_model("torchvision:googlenet", classes=4)
    assert model.train()(torch.rand(2, 3, 64, 64)).shape == (2, 4)
    assert model.transform_input
    with pytest.raises(ModelError, match="take 3 channels, the data has 1"):
        load_model("torchvision:resnet18", channels=1)


def test_a_network_of_the_model_zoo():
    model = load_model("robustbench:Addepalli2022Efficient_RN18")
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    names = [f"{prefix}Addepalli2022Efficient_RN18" for prefix in ("Linf/", "cifar10/Linf/")]
    for name in names:
        assert load_model(f"robustbench:{name}").state_dict().keys() == model.state_dict().keys()
    cifar100 = load_model("robustbench:cifar100/Linf/Rice2020Overfitting")
    assert cifar100(torch.rand(2, 3, 32, 32)).shape == (2, 100)


@pytest.mark.parametrize(
    "spec",
    [
        "timm:swin_tiny_patch4_window7_224",
        "timm:convnext_atto",
        "timm:xcit_nano_12_p16_224",
        "torchvision:swin_t",
        "torchvision:efficientnet_b0",
    ],
)
def test_shapes_are_known_before_a_network_takes_memory(spec):
    skeleton = build_skeleton(NetworkSettings(spec))
    assert isinstance(skeleton, nn.Module)
    assert all(parameter.is_meta for parameter in skeleton.parameters())


def test_a_command_mixes_and_evaluates_a_network_of_timm(tmp_path, capsys):
    """A user's own files, saved by plain PyTorch, name no network; the user does."""
    import timm

    torch.manual_seed(0)
    for name in "ab":
        model = timm.create_model("test_vit", num_classes=10, in_chans=1, img_size=8, patch_size=4)
        torch.save(model.state_dict(), tmp_path / f"{name}.pth")
    spec = "timm:test_vit:img_size=8,patch_size=4"
    named = ["--model", spec, "--data", "digits"]
    files = [str(tmp_path / "a.pth"), str(tmp_path / "b.pth")]
    with pytest.raises(SystemExit) as end:
        main(["mix", *files, *named, "-o", str(tmp_path / "soup.pth")])
    assert end.value.code == 0, capsys.readouterr().err
    soup = torch.load(tmp_path / "soup.pth")
    model.load_state_dict(soup)
    first, second = (torch.load(file) for file in files)
    for name, tensor in soup.items():
        torch.testing.assert_close(tensor, (first[name] + second[name]) / 2)


def test_normalize_inputs_keeps_the_names_of_a_vit():
    model = load_model("timm:test_vit:img_size=32")
    assert set(normalize_inputs(model, *IMAGENET).state_dict()) == set(
        load_model("timm:test_vit:img_size=32", normalize=IMAGENET).state_dict()
    )


def test_tensorboard_receives_the_figures_of_each_epoch(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    on_epoch = track(f"tensorboard:{tmp_path}")
    for epoch in (1, 2):
        on_epoch({"epoch": epoch, "loss": 2.0 / epoch})
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 2.0), (2, 1.0)]


def write_image_folder(folder, classes):
    """Write four grey images of 20 x 20 pixels for each class."""
    from PIL import Image

    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for image in range(4):
            Image.new("L", (20, 20), 50 * number + image).save(folder / name / f"{image}.png")
    return f"folder:{folder}"


def test_image_files_get_the_size_that_the_network_expects(tmp_path):
    spec = write_folder(tmp_path / "vit", num_labels=2)
    data = write_image_folder(tmp_path / "images", ("cat", "dog"))
    network = NetworkOptions(model=spec)
    loaded = load_requested_data(DataOptions(data=data), network)
    assert loaded.test.images.shape[1:] == (1, 8, 8)
    chosen = load_requested_data(DataOptions(data=data, image_size=16), network)
    assert chosen.test.images.shape[1:] == (1, 16, 16)
    assert default_image_size(data, "timm:test_vit") == 160
    assert default_image_size(data, "torchvision:vit_b_16:image_size=32") == 32
    assert default_image_size(data, "torchvision:vit_h_14") == 224
    for other, model in ((data, None), (data, "resnet9"), ("digits", spec)):
        assert default_image_size(other, model) is None


@pytest.mark.parametrize(("order", "warns"), [(("cat", "dog"), False), (("dog", "cat"), True)])
def test_another_order_of_the_classes_is_said(tmp_path, capsys, order, warns):
    names = dict(enumerate(order))
    spec = write_folder(
        tmp_path / "vit", num_labels=2, id2label=names, label2id={v: k for k, v in names.items()}
    )
    data = write_image_folder(tmp_path / "images", ("cat", "dog"))
    network = NetworkOptions(model=spec)
    make_context(load_requested_data(DataOptions(data=data), network), network, RunOptions())
    printed = capsys.readouterr().err
    assert ('class 0 is "dog" there, "cat" in the data' in " ".join(printed.split())) == warns


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers as the hub does for the files of one repository; every other path is absent."""

    files: ClassVar[dict[str, bytes]] = {}
    asked: ClassVar[list[str]] = []

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.wfile.write(self.answer())

    def answer(self):
        self.asked.append(self.path)
        content = self.files.get(self.path)
        self.send_response(404 if content is None else 200)
        self.send_header("X-Repo-Commit", "0" * 40)
        if content is None:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("ETag", f'"{hashlib.sha256(content or b"").hexdigest()}"')
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()
        return content or b""

    def log_message(self, *_arguments):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Serve a hub on this machine, with an empty cache."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(Hub, "files", {})
    monkeypatch.setattr(Hub, "asked", [])
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        address = f"http://127.0.0.1:{server.server_address[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(
            constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            address + "/{repo_id}/resolve/{revision}/{filename}",
        )
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield Hub
        server.shutdown()
        thread.join()


def test_a_repository_of_the_hub_is_read_for_its_configuration_alone(tmp_path, hub):
    write_folder(tmp_path / "vit")
    for file in (tmp_path / "vit").iterdir():
        hub.files[f"/org/vit/resolve/main/{file.name}"] = file.read_bytes()
    model = load_model("hf:org/vit", channels=1)
    assert model.network_settings.normalize == ((0.4,), (0.2,))
    assert model(torch.rand(1, 1, 8, 8)).shape == (1, 10)
    asked = {path for path in hub.asked if path.startswith("/org/")}
    names = ("config.json", "preprocessor_config.json")
    assert asked == {f"/org/vit/resolve/main/{name}" for name in names}


def test_an_absent_repository_is_one_line(hub):
    with pytest.raises(ModelError) as caught:
        load_model("hf:org/absent")
    assert 'model "hf:org/absent": has no config.json' in str(caught.value)


def test_a_hub_that_cannot_be_reached_is_one_line(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError) as caught:
        load_model("hf:org/name")
    assert "there is no such folder, and the hub does not give org/name" in str(caught.value)
    assert "\n" not in str(caught.value)
