"""Tensors, arrays and data sets of PyTorch as data: converted if their meaning is plain."""

import dataclasses

import numpy
import pytest
import torch
from PIL import Image
from torch.nn import functional
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import robustsoup as rs
from robustsoup.data import Augmentation, as_split, load_data
from robustsoup.data.splits import assemble_tensors
from robustsoup.errors import DataError, ModelError


@pytest.fixture(scope="module")
def digits():
    return load_data("digits")


@pytest.fixture(scope="module")
def samples(digits):
    """Images in [0, 1] and labels, 40 of each class."""
    return digits.test.images[:40].float() / 255, digits.test.labels[:40]


@pytest.fixture(scope="module")
def network():
    return rs.load_model("resnet9:width=2", channels=1).eval()


class Samples(Dataset):
    """Yields what a function makes of the number of a sample."""

    def __init__(self, count, make):
        self.count, self.make = count, make

    def __len__(self):
        return self.count

    def __getitem__(self, number):
        return self.make(number)


class Stream(IterableDataset):
    def __init__(self, items):
        self.items = items

    def __iter__(self):
        return iter(self.items)


SAME_IMAGES = {
    "uint8": lambda x: (x * 255).round().to(torch.uint8),
    "[0, 1]": lambda x: x,
    "float64": lambda x: x.double(),
    "0 to 255 as floats": lambda x: (x * 255).round(),
    "int32": lambda x: (x * 255).round().int(),
    "uint16 array": lambda x: (x * 255).round().numpy().astype(numpy.uint16),
    "big-endian array": lambda x: x.numpy().astype(">f4"),
    "channels last": lambda x: x.permute(0, 2, 3, 1).numpy(),
    "no channels": lambda x: x[:, 0],
    "list of tensors": list,
    "requires a gradient": lambda x: x.clone().requires_grad_(),
}
SAME_LABELS = {
    "int64": lambda y: y,
    "uint8": lambda y: y.to(torch.uint8),
    "uint16 array": lambda y: y.numpy().astype(numpy.uint16),
    "float": lambda y: y.float(),
    "column": lambda y: y[:, None],
    "float column": lambda y: y[:, None].numpy().astype(numpy.float64),
    "one-hot": lambda y: functional.one_hot(y, 10),
    "one-hot floats": lambda y: functional.one_hot(y, 10).float(),
    "one-hot bools": lambda y: functional.one_hot(y, 10).bool(),
    "list": lambda y: y.tolist(),
}


@pytest.mark.parametrize("images", SAME_IMAGES)
@pytest.mark.parametrize("kind", ["pair", "split"])
def test_images_whose_meaning_is_plain_are_converted(digits, samples, images, kind):
    x, y = samples
    given = SAME_IMAGES[images](x)
    if kind == "pair":
        split = as_split((given, y), "evaluate")
    else:
        split = rs.Split(given, y, torch.arange(40), "test", digits.record)
    assert torch.equal(split.images, digits.test.images[:40])
    assert split.images.is_contiguous()
    assert split.notes == ()


@pytest.mark.parametrize("labels", SAME_LABELS)
def test_labels_whose_meaning_is_plain_are_converted(digits, samples, labels):
    x, y = samples
    given = SAME_LABELS[labels](y)
    record = digits.record
    for split in (
        as_split((x, given), "evaluate"),
        rs.Split(digits.test.images[:40], given, torch.arange(40), "test", record),
    ):
        assert split.labels.dtype == torch.int64
        assert torch.equal(split.labels, y)


WRONG_IMAGES = {
    "normalised": (lambda x: (x - 0.5) / 0.5, "which look normalised, expected [0, 1]; give the"),
    "divided twice": (lambda x: x / 255, "from 0 to 0.003922, expected [0, 1]; were they divided"),
    "0 to 255.5": (lambda x: x * 255.5, "expected [0, 1]; divide pixels from 0 to 255 by 255"),
    "16 bits": (lambda x: (x * 65535).int(), "expected 0 to 255; divide 16 bits by 257"),
    "NaN": (lambda x: x * float("nan"), "which holds NaN or infinity"),
    "bools": (lambda x: x > 0.5, "got bool (40, 1, 8, 8), expected pixels"),
    "4 channels": (lambda x: x.expand(40, 4, 8, 8), "expected (n, c, h, w) with 1 or 3 channels c"),
    "flat": (lambda x: x.flatten(1), "got float32 (40, 64), expected (n, c, h, w)"),
    "text": (lambda x: ["a"] * 40, "got builtins.list, expected a tensor or array of numbers"),
    "none": (lambda x: None, "got builtins.NoneType, expected a tensor or array of numbers"),
    "ragged": (lambda x: [x[0], x[1, :, :4]], "tensors that do not stack"),
}
WRONG_LABELS = {
    "soft": (lambda y: functional.one_hot(y, 10) * 0.9 + 0.01, "soft labels are not supported"),
    "two classes each": (lambda y: torch.ones(40, 10), "that is not one-hot"),
    "fractions": (lambda y: y + 0.5, "expected class numbers"),
    "names": (lambda y: [str(label) for label in y], "got builtins.list, expected a tensor"),
    "three dimensions": (
        lambda y: y[:, None, None],
        "got int64 (40, 1, 1), expected",
    ),
    "negative": (lambda y: y - 1, "got -1"),
    "too few": (lambda y: y[:3], "got 40 images and 3 labels"),
}


@pytest.mark.parametrize("case", WRONG_IMAGES)
def test_other_images_are_refused_with_the_likely_cause(digits, samples, case):
    make, text = WRONG_IMAGES[case]
    given = make(samples[0])
    for attempt in (
        lambda: as_split((given, samples[1]), "evaluate"),
        lambda: rs.Split(given, samples[1], torch.arange(40), "test", digits.record),
    ):
        with pytest.raises(DataError) as caught:
            attempt()
        assert text in str(caught.value)


@pytest.mark.parametrize("case", WRONG_LABELS)
def test_other_labels_are_refused(samples, case):
    make, text = WRONG_LABELS[case]
    with pytest.raises(DataError) as caught:
        as_split((samples[0], make(samples[1])), "evaluate")
    assert text in str(caught.value)


def test_floats_between_the_steps_of_8_bits_are_rounded_by_request_and_said(
    digits, samples, network
):
    x, y = samples[0] * 0.9, samples[1]
    with pytest.raises(DataError, match=r"rs\.Split\.from_tensors rounds them, and says so"):
        rs.Split(x, y, torch.arange(40), "test", digits.record)
    split = rs.Split.from_tensors(x, y)
    assert torch.equal(split.images, (x.double() * 255).round().to(torch.uint8))
    assert rs.evaluate(network, split).warnings == ["tensors: float pixels were rounded to 8 bits"]


def test_the_network_says_how_many_classes_there_are(samples, network):
    """Few labels of one's own seldom hold the last class."""
    x, y = samples
    few = y < 4
    evaluation = rs.evaluate(network, (x[few], y[few]))
    assert len(evaluation.record["data"]["classes"]) == 10
    data = rs.Data.from_tensors(x[few], y[few])
    assert data.record["classes"] == list("0123")
    for split in (data.test, data.unsplit()):
        assert len(rs.evaluate(network, split).record["data"]["classes"]) == 10
    with pytest.raises(rs.RobustsoupError, match=r"expected 4 classes as in tensors"):
        rs.evaluate(network, rs.Split.from_tensors(x[few], y[few], classes=4))


def make_sets(samples):
    x, y = samples
    pictures = [Image.fromarray((image[0] * 255).round().to(torch.uint8).numpy()) for image in x]
    pairs = TensorDataset(x, y)

    class Dimmed(TensorDataset):
        def __getitem__(self, number):
            image, label = super().__getitem__(number)
            return 1 - image, label

    return {
        "pair": (x, y),
        "list": [x, y],
        "tensors": pairs,
        "subclass": Dimmed(1 - x, y),
        "loader": DataLoader(pairs, batch_size=7, shuffle=True),
        "subset": Subset(pairs, range(40)),
        "pictures": Samples(40, lambda number: (pictures[number], int(y[number]))),
        "dictionaries": Samples(40, lambda n: {"image": pictures[n], "label": y[n]}),
        "stream": Stream(list(zip(x, y, strict=True))),
    }


@pytest.mark.parametrize("kind", make_sets((torch.zeros(40, 1, 8, 8), torch.zeros(40))))
def test_every_kind_of_samples_can_be_evaluated(digits, samples, network, kind):
    state = torch.random.get_rng_state()
    evaluation = rs.evaluate(network, make_sets(samples)[kind])
    expected = rs.evaluate(network, digits.test.first(40))
    assert torch.equal(evaluation.prediction, expected.prediction)
    assert torch.equal(evaluation.labels, expected.labels)
    assert torch.equal(torch.random.get_rng_state(), state)


FUNCTIONS = {
    "evaluate": rs.evaluate,
    "train": lambda network, data: rs.train(network, data, threat="clean", epochs=1),
    "train: val": lambda network, data: rs.train(network, make_pair(), val=data),
    "learn": lambda network, data: rs.learn([network], data, network=network),
    "learn_dial": lambda network, data: rs.learn_dial([network], data, network=network),
    "search": lambda network, data: rs.search([network], data, ["Linf 1/255"]),
    "check": lambda network, data: rs.check([network], data=data),
    "landscape": lambda network, data: rs.landscape([network] * 3, data, threat="Linf 1/255"),
    "mix: calibrate_on": lambda network, data: rs.mix(
        [network] * 2, [0.5, 0.5], buffers="recalibrate", calibrate_on=data
    ),
}


def make_pair():
    return torch.zeros(4, 1, 8, 8), torch.arange(4)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_function_names_what_it_expects(digits, network, function):
    network = rs.Checkpoint.of(network)
    with pytest.raises(DataError) as caught:
        FUNCTIONS[function](network, digits)
    assert str(caught.value) == (
        f"{function}: got a whole data set, expected one of its splits, such as data.test"
    )
    with pytest.raises(DataError, match=f"^{function}: got str, expected a split such as data.t"):
        FUNCTIONS[function](network, "digits")


def test_the_first_of_sorted_samples_are_of_all_classes_and_named_by_their_rows(digits, network):
    order = digits.test.labels.argsort(stable=True)
    x, y = digits.test.images[order], digits.test.labels[order]
    split = as_split((x, y), "evaluate")
    few = split.first(60)
    assert set(few.labels.tolist()) == set(range(10))
    assert torch.equal(few.images, x[few.ids])
    assert torch.equal(few.labels, y[few.ids])
    assert torch.equal(few.first(20).ids, split.first(20).ids)
    assert torch.equal(split.first(len(y)).ids, torch.arange(len(y)))
    evaluation = rs.evaluate(network, (x, y), samples=60, device="cpu")
    assert torch.equal(evaluation.ids, few.ids)
    assert torch.equal(evaluation.labels, few.labels)
    assert torch.equal(digits.test.first(60).ids, digits.test.ids[:60])


def test_samples_may_be_tensors_of_any_dtype():
    images = (torch.arange(8 * 64) % 256 / 255).reshape(8, 1, 8, 8).bfloat16()
    for make in (lambda image: image, lambda image: image.clone().requires_grad_()):
        split = as_split(
            Samples(8, lambda number, make=make: (make(images[number]), number % 2)), "evaluate"
        )
        assert torch.equal(split.images, as_split((images, torch.arange(8) % 2), "evaluate").images)


def test_samples_that_differ_from_read_to_read_are_refused():
    noisy = Samples(8, lambda number: (torch.rand(1, 8, 8), number % 2))
    with pytest.raises(DataError, match=r"sample 0 differs when it is read again; remove random"):
        as_split(noisy, "evaluate")


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda number: torch.zeros(1, 8, 8),
            "got samples of type Tensor, expected",
        ),
        (lambda number: ({"path": "a"}, 1), "sample 0: got dict, expected an image: a tensor, an"),
        (
            lambda number: ("a.png", 1),
            "sample 0: got str, expected an image: a tensor, an array or",
        ),
        (lambda number: (torch.zeros(1, 8, 8).to_sparse(), 1), "sample 0 cannot be read: "),
        (
            lambda number: (torch.full((1, 8, 8), 900).to(torch.uint16), 1),
            "got int64 (4, 1, 8, 8) from 900 to 900, expected 0 to 255; divide 16 bits by 257",
        ),
        (lambda number: (1, 2, 3), "got samples of type tuple of 3, expected (image, label)"),
        (lambda number: {"pixels": 1, "label": 2}, "got samples with pixels, label, expected one"),
        (lambda number: (Image.new("L", (8, 9)), 0), "image of 8 x 9 pixels, expected square"),
        (lambda number: (Image.new("L", (8 + number,) * 2), 0), "image of 9 x 9 pixels, expected"),
    ],
)
def test_other_samples_are_refused(make, text):
    with pytest.raises(DataError) as caught:
        as_split(Samples(4, make), "evaluate")
    assert text in str(caught.value)


def test_a_loader_with_a_collate_function_of_its_own_is_refused(samples):
    loader = DataLoader(TensorDataset(*samples), collate_fn=lambda batch: batch)
    with pytest.raises(DataError, match="a DataLoader with a collate_fn of its own"):
        as_split(loader, "evaluate")


def test_data_of_tensors_holds_out_val_and_test(samples):
    x, y = samples
    data = rs.Data.from_tensors(x, y, classes=10, augmentation=Augmentation(pad=1))
    assert [len(data.train), len(data.val), len(data.test)] == [28, 4, 8]
    assert data.train.augmentation == Augmentation(pad=1)
    ids = torch.cat([data.train.ids, data.val.ids, data.test.ids])
    assert torch.equal(ids.sort().values, torch.arange(40))
    for split in (data.train, data.val, data.test):
        assert torch.equal(split.labels, y[split.ids])
    other = rs.Data.from_tensors(x, y, classes=10, seed=1)
    assert torch.equal(other.test.ids, data.test.ids)
    assert other.record["digest"] == data.record["digest"]
    assert other.record["split_digest"] != data.record["split_digest"]


def test_data_of_tensors_takes_val_and_test(samples):
    x, y = samples
    data = rs.Data.from_tensors(
        x[:20], y[:20], val=(x[20:30], y[20:30]), test=(x[30:], y[30:]), classes=list("abcdefghij")
    )
    assert [len(data.train), len(data.val), len(data.test)] == [20, 10, 10]
    assert data.record["classes"] == list("abcdefghij")
    assert torch.equal(data.val.labels, y[data.val.ids])
    assert torch.equal(data.test.labels, y[30:][data.test.ids])
    with pytest.raises(DataError, match="train and test are the same images; hold"):
        rs.Data.from_tensors(x, y, test=(x, y))


def test_statistics_are_of_train_in_any_order_of_the_parts(samples):
    x, y = samples
    parts = {"train": (x[:20], y[:20]), "test": (x[20:] / 2, y[20:])}
    given, turned = (
        assemble_tensors("parts", dict(order), seed=0)
        for order in (parts.items(), reversed(parts.items()))
    )
    assert turned.record["mean"] == given.record["mean"]
    assert turned.record["std"] == given.record["std"]


def test_data_of_a_dataset_takes_its_class_names_and_mixed_pictures():
    modes = ("RGB", "L")
    pictures = Samples(20, lambda number: (Image.new(modes[number % 2], (9, 9)), number % 2))
    pictures.classes = ["cat", "dog"]
    data = rs.Data.from_dataset(pictures, image_size=8)
    assert data.record["classes"] == ["cat", "dog"]
    assert data.train.images.shape[1:] == (3, 8, 8)
    grey = rs.Data.from_dataset(pictures, channels=1)
    assert grey.train.images.shape[1:] == (1, 9, 9)


def test_a_grey_part_beside_parts_in_colour_gets_three_channels():
    grey = Samples(6, lambda number: (Image.new("L", (9, 9), number), number % 2))
    colour = Samples(8, lambda number: (Image.new("RGB", (9, 9), (number,) * 3), number % 2))
    for parts in ({"test": grey}, {"val": grey, "test": colour}):
        train = Samples(9, lambda number: (Image.new("RGB", (9, 9), (9, 0, number)), number % 2))
        data = rs.Data.from_dataset(train, **parts)
        split = data.val if "val" in parts else data.test
        assert split.images.shape == (6, 3, 9, 9)
        assert torch.equal(split.images[:, 0], split.images[:, 2])
    turned = rs.Data.from_dataset(grey, test=colour)
    assert turned.record["channels"] == 3
    assert len(turned.train.images[0]) == len(turned.test.images[0]) == 3
    assert rs.Data.from_dataset(grey, test=colour, channels=1).record["channels"] == 1


def of_classes(names, labels):
    """A data set whose images are of the shade of their class's first letter."""

    def make(number):
        label = labels[number]
        shade = "abcd".index(names[label][0])
        return torch.full((1, 4, 4), shade, dtype=torch.uint8), label

    pictures = Samples(len(labels), make)
    pictures.classes = list(names)
    return pictures


def test_the_classes_of_val_and_test_are_translated_by_name():
    train = of_classes(("ant", "bee", "cow"), [0, 1, 2] * 4)
    test = of_classes(("cow", "ant"), [1, 0, 1])
    val = of_classes(("bee", "cow", "dog"), [0, 1])
    data = rs.Data.from_dataset(train, val=val, test=test)
    assert data.record["classes"] == ["ant", "bee", "cow"]
    for split in (data.train, data.val, data.test):
        assert torch.equal(split.labels, split.images[:, 0, 0, 0].long())
    with pytest.raises(DataError, match=r"dataset val: got samples of the classes dog, expected"):
        rs.Data.from_dataset(train, val=of_classes(("bee", "cow", "dog"), [2]))
    strange = of_classes(("ant", "bee"), [0, 1])
    strange.make = lambda number: (torch.zeros(1, 4, 4), 7)
    with pytest.raises(DataError, match=r"labels: got 7 to 7, expected 0 to 1"):
        rs.Data.from_dataset(train, test=strange)


def test_a_split_keeps_what_is_right_without_a_copy(digits):
    split = dataclasses.replace(digits.test, name="val")
    assert split.images.data_ptr() == digits.test.images.data_ptr()


@pytest.mark.parametrize(
    ("sampler", "kept"),
    [
        (lambda n: {"sampler": SubsetRandomSampler(range(10))}, "SubsetRandomSampler"),
        (lambda n: {"sampler": WeightedRandomSampler(torch.ones(n), n)}, "WeightedRandomSampler"),
        (lambda n: {"sampler": RandomSampler(range(n), num_samples=5)}, "RandomSampler"),
        (lambda n: {"batch_sampler": [[0, 1], [2]]}, "list"),
        (lambda n: {"shuffle": True}, None),
        (lambda n: {"batch_size": None}, None),
    ],
)
def test_a_loader_that_chooses_samples_is_refused(samples, sampler, kept):
    dataset = TensorDataset(*samples)
    loader = DataLoader(dataset, **sampler(len(dataset)))
    if kept is None:
        assert len(as_split(loader, "evaluate")) == len(dataset)
        return
    with pytest.raises(DataError, match=rf"a {kept}, whose choice of samples would be ignored"):
        as_split(loader, "evaluate")


class Faulty(Dataset):
    """Five samples, of which the last one, or every label, cannot be trusted."""

    def __init__(self, kind):
        self.kind, self.reads = kind, 0

    def __len__(self):
        return 5

    def __getitem__(self, number):
        self.reads += 1
        if self.kind == "raises" and number == 4:
            raise KeyError("no such file")
        return torch.zeros(1, 8, 8), self.reads % 2 if self.kind == "labels" else 0


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("raises", "evaluate: sample 4 cannot be read: KeyError: 'no such file'"),
        ("labels", "the label of sample 0 differs when it is read again"),
    ],
)
def test_a_faulty_data_set_is_named(kind, text):
    with pytest.raises(DataError, match=text):
        as_split(Faulty(kind), "evaluate")


def test_dark_images_and_labels_from_one_are_said(digits):
    sixteen = torch.round(digits.test.images / 255 * 16)
    (dark,) = rs.Split.from_tensors(sixteen.to(torch.uint8), digits.test.labels).notes
    assert "the brightest pixel is 16 of 255; if the images reach from 0 to 16, divide" in dark
    labels = digits.test.labels + 1
    split = rs.Split.from_tensors(digits.test.images, labels)
    assert "labels run from 1 to 10; if no class is numbered 0, subtract 1" in split.notes[0]
    assert rs.Split.from_tensors(digits.test.images, labels, classes=11).notes == ()
    network = rs.load_model("resnet9:width=2", channels=1)
    with pytest.raises(ModelError, match=r"expected 11 classes.*numbered from 1, subtract 1"):
        rs.evaluate(network, split, device="cpu")


def test_a_part_that_is_no_pair_is_named(samples):
    with pytest.raises(DataError, match=r"tensors val: got Tensor, expected a pair"):
        rs.Data.from_tensors(*samples, val=samples[0])
