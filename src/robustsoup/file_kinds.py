"""Recognise files that are no checkpoints, or not of the kind that their ending names."""

from io import BufferedReader

from robustsoup.archives import ZIP_SIGNATURE

_HEAD_BYTES = 1024
_TAIL_BYTES = 2**16

_GET_AGAIN = "download the file itself again"
_UNPACK = "unpack it and give the checkpoint inside"
_SIGNATURES = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file; run git lfs pull"),
    (b"GGUF", "a GGUF file of a language model; give the network's .safetensors or .pth file"),
    (b"\x89HDF", "an HDF5 file, as Keras writes; convert it to PyTorch first"),
    (b"\x93NUMPY", "a NumPy array; save the network's state_dict with torch.save"),
    (b"\x1f\x8b", f"compressed with gzip; {_UNPACK}"),
    (b"BZh", f"compressed with bzip2; {_UNPACK}"),
    (b"\xfd7zXZ", f"compressed with xz; {_UNPACK}"),
    (b"7z\xbc\xaf", f"a 7z archive; {_UNPACK}"),
    (b"Rar!", f"a RAR archive; {_UNPACK}"),
)
_IN_ARCHIVE = (
    (
        (b"/constants.pkl", b"/code/__torch__"),
        "a TorchScript file, which holds code; load it with torch.jit.load and save its state_dict",
    ),
    (
        (b"serialized_exported_program", b"archive_format", b"models/model.json"),
        "a program of torch.export; load it with torch.export.load and save its state_dict",
    ),
    (
        (b".npy",),
        "an archive of NumPy arrays; save the network's state_dict with torch.save",
    ),
    ((b"saved_model.pb", b"model.weights.h5"), "a Keras or TensorFlow model; convert it first"),
)


def recognise_file(file: BufferedReader, size: int) -> str | None:
    """Return what a file that cannot be read as its ending says is, and what to do.

    Args:
        file: The file, opened in binary mode.
        size: Its bytes.

    Returns:
        "an HTML page; ...", or None if nothing is recognised.
    """
    if not size:
        return f"an empty file, cut short; {_GET_AGAIN}"
    file.seek(0)
    head = file.read(_HEAD_BYTES)
    meanings = [meaning for signature, meaning in _SIGNATURES if head.startswith(signature)]
    if meanings:
        return meanings[0]
    if head.startswith(ZIP_SIGNATURE):
        file.seek(max(size - _TAIL_BYTES, 0))
        return _recognise_archive(file.read())
    return _recognise_model(head) or _recognise_text(head)


def _recognise_archive(tail: bytes) -> str | None:
    for names, meaning in _IN_ARCHIVE:
        if any(name in tail for name in names):
            return meaning
    if b"data.pkl" not in tail:
        return f"a zip archive of other files; {_UNPACK}"
    return None


def _recognise_model(head: bytes) -> str | None:
    if head[257:262] == b"ustar":
        return f"a tar archive; {_UNPACK}"
    # ONNX models begin with the fields ir_version, then producer_name, domain or graph.
    if head[:1] == b"\x08" and head[1:2] < b"\x20" and head[2:3] in (b"\x12", b"\x1a", b"\x3a"):
        return "an ONNX model; give the PyTorch checkpoint that it was exported from"
    return None


def _recognise_text(head: bytes) -> str | None:
    if b"\0" in head:
        return None
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype html", b"<html")) or b"<html" in text:
        return f"an HTML page, not the file behind it; {_GET_AGAIN}"
    if text.startswith(b"<?xml"):
        return f"an XML page, not the file behind it; {_GET_AGAIN}"
    if text.startswith((b"{", b"[")):
        return f"JSON text, perhaps the error message of a server; {_GET_AGAIN}"
    if len(text) > 15 and all(letter >= 32 or letter in b"\t\r\n" for letter in head):
        return f"text, perhaps the error message of a server; {_GET_AGAIN}"
    return None
