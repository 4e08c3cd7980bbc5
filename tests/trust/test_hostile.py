"""Ten hostile files of each format: refused or read within a second and 500 MB.

The second is time of the processor, and the memory is what reading adds to a process that has
PyTorch loaded. Each file is read in a process of its own, which would survive nothing worse.
"""

import json
import os
import random
import zipfile

import hostile_pickles as hostile
import pytest
from all_formats import CONFIGURATION, READ_FORMATS
from commands import CONTEXT, start_process
from hostile_pickles import bomb, group, pickle, storage, table, tensor, text
from reading_costs import read_measured

MOST_SECONDS, MOST_BYTES, HANG_SECONDS = 1.0, 500 * 2**20, 120
DEPTH, MANY = 200_000, 400_000


def fill(content):
    """Return a function that writes this content."""
    return lambda path: path.write_bytes(content)


def sparse(path):
    """Write a file of 1 TiB of zeros, which takes no place."""
    path.touch()
    os.truncate(path, 2**40)


def link_to_zeros(path):
    """Make the file a link to an endless device."""
    path.symlink_to("/dev/zero")


EVERYWHERE = {
    "nothing": fill(b""),
    "a folder": lambda path: path.mkdir(),
    "a FIFO": os.mkfifo,
    "an endless device": link_to_zeros,
    "1 TiB of zeros": sparse,
    "12 MiB of noise": lambda path: path.write_bytes(random.Random(0).randbytes(12 * 2**20)),
    "12 MiB of brackets": fill(b"[" * 12 * 2**20),
    "12 MiB of digits": fill(b"9" * 12 * 2**20),
}


def with_header(header, data=b""):
    """Return a .safetensors file with this header."""
    return len(header).to_bytes(8, "little") + header + data


def entry(shape, places):
    """Return the header of a tensor."""
    return b'{"w":{"dtype":"F32","shape":%s,"data_offsets":%s}}' % (shape, places)


SAFETENSORS = {
    "a header of 8 EiB": fill((2**63).to_bytes(8, "little") + b"{}"),
    "a deep header": fill(with_header(b'{"a":' * DEPTH)),
    "many tensors": fill(with_header(b"{" + b",".join(b'"%d":{}' % n for n in range(MANY)) + b"}")),
    "a huge shape": fill(with_header(entry(b"[4611686018427387904,4]", b"[0,16]"), bytes(16))),
    "a huge shape of none": fill(with_header(entry(b"[4294967296,0]", b"[0,0]"))),
    "a long number": fill(with_header(entry(b"[" + b"9" * 2**20 + b"]", b"[0,16]"), bytes(16))),
}
JSON = {
    "deep tables": fill(b'{"a":' * DEPTH),
    "many keys": fill(b"{" + b",".join(b'"%d":0' % n for n in range(MANY)) + b"}"),
    "a repeated key": fill(b"{" + b",".join([b'"a":0'] * MANY) + b"}"),
    "an infinite number": fill(b'{"seconds":1e999}'),
    "many escapes": fill(b'{"a":"' + b"\\u0000" * 10**6 + b'"}'),
}
TOML = {
    "deep arrays": fill(b"a = " + b"[" * 100_000),
    "a deep key": fill(b".".join([b"a"] * 60_000) + b" = 1"),
    "a long number": fill(b"seed = " + b"9" * 200_000),
    "many tables": fill(b"\n".join(b"[a%d]" % n for n in range(20_000))),
    "one table many times": fill(b"[[a]]\n" * 40_000),
    "an inline table many times": fill(b"a = [" + b"{b = 1}," * 25_000 + b"]"),
}


def write_pickle(content):
    """Return a function that writes an archive with a pickle."""
    return lambda path: hostile.write_archive(path, content)


def many_members(path):
    """Write an archive of very many members."""
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(30_000):
            archive.writestr(f"archive/data/{number}", b"")


PICKLES = {
    "a bomb": lambda path: bomb(path, 1500),
    "a deep pickle": write_pickle(pickle(hostile.nest(DEPTH))),
    "a doubling pickle": write_pickle(pickle(hostile.double(64))),
    "a huge stride": write_pickle(pickle(table((text("w"), tensor([2], [2**62]))))),
    "a huge view": write_pickle(pickle(table((text("w"), tensor([2**31, 2**10], [0, 0]))))),
    "a huge storage": write_pickle(
        pickle(table((text("w"), tensor([2**40], [1], stored=storage(2**40)))))
    ),
    "many members": many_members,
    "a tuple of tuples": write_pickle(pickle(group(*[hostile.nest(30)] * 20_000))),
}


def zip_of(name, content, times=1):
    """Return a function that writes a compressed archive with one member."""

    def write(path):
        with (
            zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
            archive.open(name, "w", force_zip64=True) as member,
        ):
            for _ in range(times):
                member.write(content)

    return write


def array_header(shape, descr="'<i8'"):
    """Return the header of an array as numpy writes it."""
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()


ARRAYS = {
    "a bomb": zip_of("ids.npy", bytes(2**20), 1500),
    "a huge array": zip_of("ids.npy", array_header("(1152921504606846976,)") + bytes(64)),
    "an array of objects": zip_of("ids.npy", array_header("(1,)", "'|O'") + bytes(64)),
    "many dimensions": zip_of("ids.npy", array_header("(" + "1, " * 40 + ")") + bytes(64)),
    "many members": many_members,
}


def configure(**changes):
    """Return a function that writes the configuration of a network of transformers."""
    return fill(json.dumps(CONFIGURATION | changes).encode())


CONFIGURATIONS = {
    "a huge image": configure(image_size=999_999, patch_size=1),
    "huge layers": configure(hidden_size=999_999, intermediate_size=999_999),
    "many layers": configure(num_hidden_layers=1_000),
    "too many layers": configure(num_hidden_layers=10**9),
    "many stages": configure(model_type="swin", depths=[1_000] * 1_000, num_heads=[1] * 1_000),
    "many classes": configure(id2label={str(n): str(n) for n in range(100_000)}),
    "an endless number": configure(hidden_size=float("inf")),
    "code of its own": configure(auto_map={"AutoConfig": "evil.Config"}, model_type="evil"),
    "a backbone": configure(model_type="upernet", backbone="evil/network"),
    "kernels of the hub": configure(attn_implementation="evil/kernels"),
}
OWN = {
    ".safetensors": SAFETENSORS,
    ".pth": PICKLES,
    ".pt": PICKLES,
    ".json": JSON,
    ".toml": TOML,
    ".npz": ARRAYS,
}
"""Hostile files by the ending of a format."""


@pytest.mark.parametrize("kind", READ_FORMATS)
def test_hostile_files_cost_little(tmp_path, tally_of, kind):
    tally = tally_of(f"hostile files: {kind}")
    save, _ = READ_FORMATS[kind]
    path = save(tmp_path)
    files = EVERYWHERE | OWN[path.suffix]
    if path.name == "config.json":
        files |= CONFIGURATIONS
    assert len(files) >= 10
    for name, write in files.items():
        path.rmdir() if path.is_dir() else path.unlink()
        write(path)
        results = CONTEXT.SimpleQueue()
        process = start_process(read_measured, kind, str(path), results)
        process.join(HANG_SECONDS)
        tally.count()
        if process.exitcode != 0:
            process.kill()
            tally.lost.append(f"{name}: exit code {process.exitcode}")
            continue
        outcome, seconds, size = results.get()
        if outcome or seconds > MOST_SECONDS or size > MOST_BYTES:
            tally.lost.append(
                f"{name}: {outcome or 'costs'} {seconds:.2f} s, {size / 2**20:.0f} MB"
            )
    tally.check()
