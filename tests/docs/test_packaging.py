"""pyproject.toml, the constraints files and the other metadata agree with each other."""

import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]


def read_pins(name):
    """Return {package: version} of a constraints file."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return dict(re.findall(r"^([\w.-]+)==([\w.]+)", text, re.MULTILINE))


def read_floors(requirements):
    """Return {package: oldest version} of requirements such as "numpy>=1.26"."""
    return dict(
        re.fullmatch(r"([\w.-]+)>=([\w.]+)", requirement).groups()
        for requirement in requirements
        if not requirement.startswith("robustsoup[")
    )


def as_numbers(version):
    return tuple(int(part) for part in version.split("."))


def test_the_oldest_pins_are_what_the_project_promises():
    floors = read_floors(
        [*PROJECT["dependencies"], *EXTRAS["folders"], *EXTRAS["autoattack"]],
    )
    pins = read_pins("constraints-oldest.txt")
    for package, floor in floors.items():
        length = len(as_numbers(floor))
        assert as_numbers(pins[package])[:length] == as_numbers(floor), package
        assert not any(as_numbers(pins[package])[length:]), package


def test_every_dependency_is_pinned_at_or_above_its_floor():
    pins = read_pins("constraints.txt") | read_pins("constraints-extras.txt")
    for extra in (PROJECT["dependencies"], *EXTRAS.values()):
        for package, floor in read_floors(extra).items():
            assert as_numbers(pins[package]) >= as_numbers(floor), package


def test_the_hosted_checks_install_the_pinned_versions_by_their_digests():
    text = (ROOT / "requirements-ci.txt").read_text(encoding="utf-8")
    blocks = re.split(r"\n(?=\S)", text.partition("\n\n")[2].strip())
    digests = r"( \\\n    --hash=sha256:[0-9a-f]{64})+"
    requirement = r"([\w.-]+)==([\w.]+)(?: ; [\w .<>='()]+)?" + digests
    locked = {}
    for block in blocks:
        match = re.fullmatch(requirement, block)
        assert match, block[:200]
        locked.setdefault(match[1], set()).add(match[2])
    pins = read_pins("constraints.txt")
    assert pins.pop("torch")
    assert "torch" not in locked
    for package, version in pins.items():
        assert locked.get(package) == {version}, f"{package}: run `make lock`"


def test_every_job_of_the_hosted_checks_installs_by_digests():
    yaml = pytest.importorskip("yaml")
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text("utf-8"))
    assert workflow["permissions"] == {"contents": "read"}
    for name, job in workflow["jobs"].items():
        commands = "\n".join(step.get("run", "") for step in job["steps"])
        assert re.search(r"\bmake hashed\b", commands), name
    assert "make audit" in str(workflow["jobs"]["audit"])


def test_the_audit_reads_all_pinned_dependencies():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (commands,) = re.findall(r"^audit:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    audited = re.findall(r"pip-audit .*-r (\S+)", commands)
    assert audited == ["requirements-ci.txt", "constraints.txt", "constraints-extras.txt"]


def test_the_source_archive_holds_what_the_tests_read():
    build = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["hatch"]["build"]
    patterns = [*build["targets"]["sdist"]["include"], "/pyproject.toml"]
    reads = re.compile(r'(?:ROOT|parents\[2\]) / "([^"]+)"')
    for path in (ROOT / "tests").rglob("*.py"):
        for name in reads.findall(path.read_text("utf-8")):
            assert any(fnmatch(f"/{name}", pattern) for pattern in patterns), f"{path}: {name}"


def test_the_floor_of_torch_is_at_most_2_6():
    floor = read_floors(PROJECT["dependencies"])["torch"]
    assert as_numbers(floor) <= (2, 6)


def test_versions_agree():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"\nversion: {PROJECT['version']}\n" in citation
    assert f"## [{PROJECT['version']}]" in changelog


@pytest.mark.parametrize("name", [".github/workflows/ci.yml", ".pre-commit-config.yaml"])
def test_yaml_files_parse(name):
    yaml = pytest.importorskip("yaml")
    assert yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def test_ci_runs_every_python_that_the_project_names():
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    versions = [
        line.rpartition(" ")[2] for line in PROJECT["classifiers"] if "Python :: 3." in line
    ]
    assert versions
    assert all(f'"{version}"' in workflow for version in versions)
