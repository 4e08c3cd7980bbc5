"""Files of torch.save: the same content as torch.load(weights_only=True) reads."""

from collections import Counter, OrderedDict

import pytest
import torch
from hostile_pickles import pickle, tensor
from torch import nn

from robustsoup.files import write_torch
from robustsoup.torch_files import read_torch

BASE = torch.arange(24.0).view(2, 3, 4)
OPTIMIZER = torch.optim.Adam(nn.Linear(2, 2).parameters())
OPTIMIZER.param_groups[0]["params"][0].grad = torch.ones(2, 2)
OPTIMIZER.step()

CONTENTS = {
    "a state dict": nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).state_dict(),
    "an optimizer": OPTIMIZER.state_dict(),
    "numbers": [0, 1, 255, 256, 65535, 65536, -1, 2**31, -(2**40), 2**63, 1.5, -0.0, True, None],
    "text": ["", "a", "grüße", "x" * 300, "\n", b"bytes\xff"],
    "containers": {"list": [], "tuple": (1, (2, (3, 4, 5, 6))), "dict": {}, "set": {1, 2}, 3: 4},
    "rarer types": [complex(1, 2), bytearray(b"ab"), Counter("aab"), OrderedDict(a=1, b=[2])],
    "types of PyTorch": [torch.Size([1, 2]), torch.float16, torch.device("cpu"), torch.int8],
    "views": [BASE, BASE.transpose(0, 2), BASE[1], BASE[:, 1:, ::2], BASE.new_ones(1).expand(9)],
    "shapes": [torch.tensor(5), torch.empty(0), torch.empty(3, 0, 2), torch.ones((1,) * 8)],
    "parameters": [nn.Parameter(BASE), nn.Parameter(BASE, requires_grad=False)],
    "element types": [
        torch.ones(3).to(dtype)
        for dtype in (
            *(torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
            *(torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.bool),
            *(torch.uint16, torch.uint32, torch.uint64, torch.complex64, torch.complex128),
        )
    ],
}


def same(left, right):
    """Compare nested content with types, shapes, strides and bytes."""
    if isinstance(left, torch.Tensor):
        return (
            type(left) is type(right)
            and (left.dtype, left.shape) == (right.dtype, right.shape)
            and left.stride() == right.stride()
            and bytes_of(left) == bytes_of(right)
        )
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return repr(left) == repr(right)


def bytes_of(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("kind", CONTENTS)
def test_an_archive_is_read_as_torch_load_reads_it(tmp_path, kind, mapped):
    path, content = tmp_path / "a.pt", CONTENTS[kind]
    torch.save(content, tmp_path / "foreign.pt")
    write_torch(path, content)
    expected = torch.load(path, weights_only=True)
    for file in (path, tmp_path / "foreign.pt"):
        with file.open("rb") as opened:
            assert same(read_torch(opened, mapped=mapped), expected)


@pytest.mark.parametrize(
    "kind", sorted(CONTENTS.keys() - {"element types"})
)  # it has fewer of these
def test_the_old_format_is_read_as_torch_load_reads_it(tmp_path, kind):
    path = tmp_path / "a.pt"
    torch.save(CONTENTS[kind], path, _use_new_zipfile_serialization=False)
    with path.open("rb") as opened:
        assert same(read_torch(opened), torch.load(path, weights_only=True))


def test_attributes_of_a_state_dict_are_kept(tmp_path):
    state = nn.BatchNorm2d(2).state_dict()
    write_torch(tmp_path / "a.pt", state)
    with (tmp_path / "a.pt").open("rb") as opened:
        assert read_torch(opened)._metadata == state._metadata


def test_tensors_of_one_storage_share_memory(tmp_path):
    write_torch(tmp_path / "a.pt", [BASE, BASE[0], BASE])
    for mapped in (False, True):
        with (tmp_path / "a.pt").open("rb") as opened:
            first, part, again = read_torch(opened, mapped=mapped)
        assert first.data_ptr() == part.data_ptr() == again.data_ptr()


def test_a_block_may_be_shared_many_times_but_not_any_number_of_times(tmp_path):
    path, block = tmp_path / "a.pt", torch.zeros(2**19)
    torch.save({f"blocks.{number}.weight": block.detach() for number in range(24)}, path)
    with path.open("rb") as opened:
        read = read_torch(opened)
    assert len({tensor.data_ptr() for tensor in read.values()}) == 1
    different = [block[start:] for start in range(24)]
    for content in ([block.detach() for _ in range(1000)], different):
        torch.save(content, path)
        with path.open("rb") as opened, pytest.raises(ValueError, match=r"as a \.safetensors file"):
            read_torch(opened)


def test_copies_can_be_changed_without_the_file(tmp_path):
    write_torch(tmp_path / "a.pt", BASE)
    before = (tmp_path / "a.pt").read_bytes()
    with (tmp_path / "a.pt").open("rb") as opened:
        read_torch(opened).add_(1)
    assert (tmp_path / "a.pt").read_bytes() == before


@pytest.mark.parametrize(
    "content",
    [
        torch.ones(2, 2).to_sparse(),
        torch.empty(2, device="meta"),
    ],
    ids=["sparse", "meta"],
)
def test_other_tensors_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "a.pt")
    with (
        (tmp_path / "a.pt").open("rb") as opened,
        pytest.raises(ValueError, match=r"sparse or quantized|the name|without a type"),
    ):
        read_torch(opened)


def test_an_old_file_that_begins_with_a_tensor_is_refused(tmp_path):
    path = tmp_path / "a.pth"
    path.write_bytes(pickle(tensor([4], [1])))
    with path.open("rb") as file, pytest.raises(ValueError, match="did not write"):
        read_torch(file)


def test_an_old_file_whose_storages_have_numbers_for_names_is_refused(tmp_path):
    path = tmp_path / "a.pth"
    torch.save({"w": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    names, rest = content.rsplit(b"]", 1)
    path.write_bytes(names + b"]K\x00a." + rest[-16:])
    with path.open("rb") as file, pytest.raises(ValueError, match="storages without names"):
        read_torch(file)
