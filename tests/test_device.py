"""Devices and precisions by name, and autocast."""

import pytest
import torch

from robustsoup.device import autocast, resolve_device, resolve_precision
from robustsoup.errors import RequestError
from robustsoup.seeding import keyed_generator

CPU = torch.device("cpu")


def test_devices_by_name():
    assert resolve_device("cpu") == CPU
    assert resolve_device(CPU) == CPU
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["tpu", "cuda:99", ""])
def test_a_device_that_does_not_exist_is_refused_in_one_line(name):
    with pytest.raises(RequestError, match=f'device: "{name}" cannot be used: ') as caught:
        resolve_device(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_a_named_precision_is_kept(name):
    assert resolve_precision(name, CPU) == name


def test_the_automatic_precision_depends_on_the_processor(monkeypatch):
    for supported, precision in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(
            torch.cpu, "_is_avx512_bf16_supported", lambda s=supported: s, raising=False
        )
        assert resolve_precision("auto", CPU) == precision
    assert resolve_precision("auto", torch.device("meta")) == "float32"


def test_an_unknown_precision_is_refused():
    text = 'precision: got "half", expected one of auto, float32, bfloat16'
    with pytest.raises(RequestError, match=text):
        resolve_precision("half", CPU)


@pytest.mark.parametrize("outer", [False, True])
@pytest.mark.parametrize(
    ("precision", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)]
)
def test_a_forward_pass_runs_in_the_requested_precision(precision, dtype, outer):
    x = torch.rand(2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=outer):
        with autocast(CPU, precision):
            assert (x @ x).dtype == dtype
        assert (x @ x).dtype == (torch.bfloat16 if outer else torch.float32)
    with autocast(torch.device("meta"), "float32"):  # a device without autocast
        assert (x @ x).dtype == torch.float32


def test_every_part_of_a_key_changes_the_stream():
    def draw(*key):
        return tuple(torch.rand(4, generator=keyed_generator(*key)).tolist())

    assert draw("noise", 0, 1) == draw("noise", 0, 1)
    keys = [("noise", 0, 1), ("noise", 1, 0), ("order", 0, 1), ("noise", 0, 2), ("noise", 0)]
    assert len({draw(*key) for key in keys}) == len(keys)
