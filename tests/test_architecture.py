"""The rules of docs/architecture.md that a linter does not know, as tests."""

import ast
import functools
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("ediffi", "pipelines", "cluster")
CODE = sorted(
    path for package in (*PACKAGES, "benchmarks") for path in (ROOT / package).rglob("*.py")
)
TESTS = sorted((ROOT / "tests").rglob("*.py"))
MAX_LINES = 350

# Longer than MAX_LINES on purpose, each with the reason it is kept whole.
LONG_FILES: dict[str, str] = {}

# Modules that exist for one heavy package, and may import it at their top.
NEEDS_MORE_THAN_TORCH: dict[str, str] = {
    "ediffi.clip_fit": "trains an open_clip model",
}

# Where the package that is imported and the distribution that is installed have different names.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "yaml": "pyyaml",
    "open_clip": "open-clip-torch",
    "upath": "universal-pathlib",
}

BLOCKER = """
import importlib.abc, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"blocked: {name}", name=name)

sys.meta_path.insert(0, Blocker())
"""


def relative(path: Path) -> str:
    """Return a path as it reads from the repository's root."""
    return path.relative_to(ROOT).as_posix()


def module_name(path: Path) -> str:
    """Return the dotted name of a source file."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def tree(path: Path) -> ast.Module:
    """Return the syntax tree of a source file."""
    return ast.parse(path.read_text(encoding="utf-8"))


def run_without(blocked: set[str], code: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a new interpreter in which the `blocked` packages cannot be imported."""
    script = f"BLOCKED = {blocked!r}\n{BLOCKER}\n{code}"
    return subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )


def imported_packages(path: Path) -> Iterator[str]:
    """Yield the top-level package of every import in a file, those inside functions too."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module.partition(".")[0]


def beyond_torch() -> set[str]:
    """Return all that the code imports, but for what ediffi needs: what a bare GPU machine has."""
    allowed = {"torch", "numpy", "safetensors", "ediffi"} | sys.stdlib_module_names
    imported = {package for path in CODE for package in imported_packages(path)}
    return (imported | {"ray", "mlflow", "deepspeed", "yaml", "pydantic", "pandas"}) - allowed


def pyproject() -> dict:
    """Return pyproject.toml, parsed."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def direct_dependencies() -> dict[str, Requirement]:
    """Return the requirements of pyproject.toml, those of the dev extra too, by canonical name."""
    project = pyproject()["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    requirements = [Requirement(line) for line in lines]
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


def locked_requirements() -> dict[str, Requirement]:
    """Return the lines of requirements.lock by canonical name."""
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


def locked_version(name: str) -> str:
    """Return the version that requirements.lock pins, "" if it does not."""
    requirement = locked_requirements().get(canonicalize_name(name))
    return next(iter(requirement.specifier)).version if requirement else ""


def test_library_imports_with_torch_alone() -> None:
    """Every module of ediffi imports where torch, numpy and safetensors are all there is."""
    modules = [module_name(path) for path in CODE if path.parts[len(ROOT.parts)] == "ediffi"]
    modules = [name for name in modules if name not in NEEDS_MORE_THAN_TORCH]
    code = f"import importlib\nfor name in {modules!r}:\n    importlib.import_module(name)"
    result = run_without(beyond_torch(), code)
    assert result.returncode == 0, result.stderr


def test_command_line_starts_without_the_heavy_packages() -> None:
    """`ediffi plan` and `ediffi status` must answer in under a second: no torch, ray or mlflow."""
    blocked = {"torch", "ray", "mlflow", "deepspeed", "transformers", "open_clip", "pandas"}
    result = run_without(blocked, "import pipelines.cli")
    assert result.returncode == 0, result.stderr


def test_blocker_blocks() -> None:
    """The two tests above rest on an import hook: it must stop what it is told to stop."""
    result = run_without({"json"}, "import json")
    assert result.returncode != 0
    assert "blocked: json" in result.stderr


def test_every_exemption_is_needed() -> None:
    """A module exempt from the torch-only rule, or from the length limit, is there and needs it."""
    for name in NEEDS_MORE_THAN_TORCH:
        assert run_without(beyond_torch(), f"import {name}").returncode != 0, name
    for name in LONG_FILES:
        assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) > MAX_LINES, name


@pytest.mark.parametrize("path", [*CODE, *TESTS], ids=relative)
def test_file_is_short_and_says_what_it_is(path: Path) -> None:
    """A file has a docstring; code has at most 350 lines, a test is as long as what it mirrors."""
    text = path.read_text(encoding="utf-8")
    if path.name == "__init__.py" and not text.strip():
        return
    assert ast.get_docstring(tree(path)), f"{relative(path)} has no module docstring"
    if path in CODE and relative(path) not in LONG_FILES:
        assert len(text.splitlines()) <= MAX_LINES, "split it by concept, or say why in LONG_FILES"


def test_names_say_what_is_inside() -> None:
    """No module is named after nothing in particular."""
    vague = {"utils", "util", "helpers", "helper", "common", "misc", "manager", "base"}
    assert [relative(path) for path in CODE if path.stem in vague] == []


def test_nothing_is_left_for_later() -> None:
    """Unfinished work is an issue, not a marker in the code."""
    marker = re.compile(
        r"\b(" + "|".join(("TO" + "DO", "FIX" + "ME", "X" * 3, "HA" + "CK")) + r")\b"
    )
    found = [
        f"{relative(path)}:{number}"
        for path in [*CODE, *TESTS]
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if marker.search(line)
    ]
    assert found == []


@pytest.mark.parametrize("path", [p for p in TESTS if p.name.startswith("test_")], ids=relative)
def test_every_test_says_what_it_shows(path: Path) -> None:
    """Every test has a docstring: the behaviour, in one sentence."""
    silent = [
        node.name
        for node in ast.walk(tree(path))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and node.name.startswith("test_")
        and not ast.get_docstring(node)
    ]
    assert silent == []


def test_every_import_is_declared() -> None:
    """What the code imports is in pyproject.toml itself, not there by another package's grace."""
    ours = {*PACKAGES, "benchmarks"} | set(sys.stdlib_module_names)
    declared = direct_dependencies()
    undeclared = {
        f"{relative(path)}: {package}"
        for path in CODE
        for package in imported_packages(path)
        if package not in ours
        and "toys" not in path.parts  # for the environments of the benchmarks' other sides
        and canonicalize_name(DISTRIBUTIONS.get(package, package)) not in declared
    }
    assert undeclared == set()


def test_lock_satisfies_the_ranges() -> None:
    """Each direct dependency is pinned, inside the range that pyproject.toml states."""
    for name, requirement in direct_dependencies().items():
        version = locked_version(name)
        assert requirement.specifier.contains(version), f"{requirement}: locked at {version!r}"


def test_lock_names_versions_and_no_places() -> None:
    """Every line is NAME==VERSION: no host, no path, no project of our own."""
    for name, requirement in locked_requirements().items():
        assert requirement.url is None, name
        assert [specifier.operator for specifier in requirement.specifier] == ["=="], name
    assert "ediffi" not in locked_requirements()


def test_dependency_table_is_true() -> None:
    """docs/dependencies.md tells every direct dependency once, at the version that is locked."""
    table = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([^`]+)` \| ([^ |]+) \| [^|]{10,} \| [^|]+ \|$", table, flags=re.M)
    told = {canonicalize_name(name): version for name, version in rows}
    assert len(told) == len(rows)
    assert told == {name: locked_version(name) for name in direct_dependencies()}


def test_links_between_documents_resolve() -> None:
    """A relative link in a Markdown file points at something that is there."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    broken = [
        f"{relative(page)}: {target}"
        for page in pages
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
        if "://" not in target and not (page.parent / target).exists()
    ]
    assert broken == []


@pytest.mark.slow
def test_wheel_holds_the_code_and_its_data(tmp_path: Path) -> None:
    """A built wheel has every module, recipe, profile and data file that a checkout has."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for package in PACKAGES:
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, source / package, ignore=ignore)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    result = subprocess.run(
        [*build, "--wheel-dir", str(tmp_path), str(source)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    with zipfile.ZipFile(next(tmp_path.glob("ediffi-*.whl"))) as wheel:
        built = set(wheel.namelist())
    wanted = {
        path.relative_to(source).as_posix()
        for package in PACKAGES
        for path in (source / package).rglob("*")
        if path.is_file()
    }
    assert wanted - built == set()
