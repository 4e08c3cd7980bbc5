"""Checks of `robustsoup doctor`: versions, extras, devices, folders, and causes of slowness."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from robustsoup.attacks.lanes import lane_count
from robustsoup.cli.tables import format_bytes
from robustsoup.cli.terminal import print_line
from robustsoup.cli.versions import list_extras, list_versions, package_version
from robustsoup.data import data_root as locate_data
from robustsoup.device import count_usable_cores, resolve_device, resolve_precision
from robustsoup.files import cache_folder
from robustsoup.runs.caches import list_caches
from robustsoup.runs.store import Store


def diagnose(data_root: str | None = None) -> dict[str, Any]:
    """Return everything that `robustsoup doctor` shows, JSON-able.

    Args:
        data_root: Folder of the data; None for the default folder.
    """
    cpu = describe_cpu()
    gpus = describe_gpus()
    return {
        "versions": {"robustsoup": package_version("robustsoup")} | list_versions(),
        "extras": describe_extras(),
        "cpu": cpu,
        "gpus": gpus,
        "folders": describe_folders(data_root),
        "caches": describe_caches(),
        "slow": explain_slowness(cpu, gpus),
    }


def describe_extras() -> dict[str, dict[str, Any]]:
    """Return, for each extra, whether it is installed, its packages, and how to install it."""
    return {
        extra: {
            "installed": all(packages.values()),
            "packages": packages,
            "install": f"pip install 'robustsoup[{extra}]'",
        }
        for extra, packages in list_extras().items()
    }


def describe_cpu() -> dict[str, Any]:
    """Return cores, threads, vector kernels and arithmetic of the CPU."""
    device = torch.device("cpu")
    return {
        "cores": count_usable_cores(),
        "threads": torch.get_num_threads(),
        "attack_lanes": lane_count(device),
        "kernels": torch.backends.cpu.get_cpu_capability(),
        "bfloat16": resolve_precision("auto", device) == "bfloat16",
    }


def describe_gpus() -> list[dict[str, Any]]:
    """Return name, memory in bytes and arithmetic of each CUDA device."""
    gpus = []
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        device = torch.device("cuda", number)
        gpus.append(
            {
                "name": properties.name,
                "memory": properties.total_memory,
                "compute_capability": f"{properties.major}.{properties.minor}",
                "bfloat16": resolve_precision("auto", device) == "bfloat16",
            }
        )
    return gpus


def describe_folders(data_root: str | None = None) -> dict[str, dict[str, Any]]:
    """Return path and size in bytes of the data, the store and the cache; None if absent."""
    folders = {
        "data": locate_data(data_root),
        "store": Store().root,
        "cache": cache_folder(),
    }
    return {
        name: {"path": str(path), "bytes": measure_folder(path)} for name, path in folders.items()
    }


def describe_caches() -> dict[str, dict[str, Any]]:
    """Return path, number of entries and bytes of the store and of the other caches."""
    return {
        cache.name: {
            "path": str(cache.folder),
            "entries": len(entries),
            "bytes": sum(measure_entry(entry) for entry in entries),
        }
        for cache in list_caches()
        for entries in [cache.entries()]
    }


def describe_cache(name: str, cache: Mapping[str, Any]) -> str:
    """Return one line for an entry of `describe_caches`."""
    entries = f"{cache['entries']} entr{'y' if cache['entries'] == 1 else 'ies'}"
    return f"cached {name}: {entries}, {format_bytes(cache['bytes'])} in {cache['path']}"


def measure_entry(entry: Path) -> int:
    """Return the size of a file or of all files in a folder; 0 if it vanished."""
    size = measure_folder(entry)
    if size is None:
        try:
            return entry.lstat().st_size
        except OSError:
            return 0
    return size


def measure_folder(folder: Path) -> int | None:
    """Return the size of all files in a folder, or None if it does not exist.

    Files that vanish or cannot be read are skipped; links are not followed.
    """
    if not folder.is_dir():
        return None
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += Path(parent, name).lstat().st_size
            except OSError:
                continue
    return total


def explain_slowness(cpu: Mapping[str, Any], gpus: list[dict[str, Any]]) -> list[str]:
    """Return one sentence for each cause of slowness on this machine.

    Args:
        cpu: What `describe_cpu` returned.
        gpus: What `describe_gpus` returned.
    """
    causes = []
    if resolve_device("auto").type == "cpu":
        causes.append(
            "no CUDA device: everything runs on the CPU, often 10 to 100 times slower than on a GPU"
        )
        if not cpu["bfloat16"]:
            causes.append(
                "the CPU has no native bfloat16: --precision auto computes in float32; bfloat16 "
                "would be slower still"
            )
    causes += [
        f"{gpu['name']} has no native bfloat16: --precision auto computes in float32"
        for gpu in gpus
        if not gpu["bfloat16"]
    ]
    if cpu["threads"] > cpu["cores"]:
        causes.append(
            f"{cpu['threads']} threads share {cpu['cores']} cores: set OMP_NUM_THREADS or "
            f"--threads to {cpu['cores']} or less"
        )
    if cpu["threads"] < cpu["cores"]:
        causes.append(
            f"{cpu['threads']} of {cpu['cores']} cores are used: --threads {cpu['cores']} or "
            "OMP_NUM_THREADS uses more"
        )
    if cpu["kernels"] in ("DEFAULT", "NO AVX"):
        causes.append(
            "PyTorch uses its kernels without vector instructions, because the CPU lacks AVX2 or "
            "ATEN_CPU_CAPABILITY forbids it"
        )
    return causes


def print_diagnosis(diagnosis: Mapping[str, Any]) -> None:
    """Print what `diagnose` returned."""
    for name, version in diagnosis["versions"].items():
        print_line(f"{name} {version or 'not installed'}")
    for name, extra in diagnosis["extras"].items():
        packages = ", ".join(
            f"{package} {version}" for package, version in extra["packages"].items() if version
        )
        print_line(f"extra {name}: {packages if extra['installed'] else extra['install']}")
    cpu = diagnosis["cpu"]
    print_line(
        f"cpu: cores {cpu['cores']}, threads {cpu['threads']}, attack lanes {cpu['attack_lanes']}, "
        f"kernels {cpu['kernels']}, {_describe_bfloat16(cpu)}"
    )
    for number, gpu in enumerate(diagnosis["gpus"]):
        print_line(
            f"cuda:{number}: {gpu['name']}, {format_bytes(gpu['memory'])}, compute capability "
            f"{gpu['compute_capability']}, {_describe_bfloat16(gpu)}"
        )
    if not diagnosis["gpus"]:
        print_line("cuda: none")
    for name, folder in diagnosis["folders"].items():
        size = "absent" if folder["bytes"] is None else format_bytes(folder["bytes"])
        print_line(f"{name}: {folder['path']} ({size})")
    for name, cache in diagnosis["caches"].items():
        print_line(describe_cache(name, cache))
    for cause in diagnosis["slow"]:
        print_line(f"slow: {cause}")
    if not diagnosis["slow"]:
        print_line("slow: no cause found")


def _describe_bfloat16(device: Mapping[str, Any]) -> str:
    return "native bfloat16" if device["bfloat16"] else "no native bfloat16"
