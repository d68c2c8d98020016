"""What of a user's own code a custom stage consists of, and a digest that changes when it does.

The closure holds the stage's module and all that it imports, directly or through others, from the
directory that the module itself comes from: installed packages and ours are left out. It is found
by reading, without running anything; what is imported by a name that is put together at run time
is not seen. Comments and blank lines do not count.
"""

from __future__ import annotations

import ast
import hashlib
import io
import tokenize
from collections.abc import Iterator
from pathlib import Path

OURS = ("cluster", "ediffi", "pipelines")  # their changes are told by the stages' versions
_INSTALLED = ("site-packages", "dist-packages")


def closure_digest(module: str, root: Path) -> str:
    """A sha256 over the names and the code of every module in the closure.

    Args:
        module: dotted name of the stage's module.
        root: directory that its outermost package lies in.

    Raises:
        ValueError: a file is no Python.
    """
    whole = hashlib.sha256()
    for name, path in sorted(closure(module, root).items()):
        code = hashlib.sha256(_essence(path).encode()).hexdigest()
        whole.update(f"{name} {code}\n".encode())
    return whole.hexdigest()


def closure(module: str, root: Path) -> dict[str, Path]:
    """The modules of the closure with their files, by dotted name."""
    found: dict[str, Path] = {}
    package = module.partition(".")[0]
    is_installed = any(part in _INSTALLED for part in root.parts)
    waiting = [module]
    while waiting:
        name = waiting.pop()
        top = name.partition(".")[0]
        if name in found or top in OURS or (is_installed and top != package):
            continue
        if (path := _file_of(name, root)) is None:
            continue
        found[name] = path
        waiting += [name.rpartition(".")[0]] if "." in name else []  # packages run first
        waiting += _imports(name, path)
    return found


def _file_of(name: str, root: Path) -> Path | None:
    """Where a module's code lies below `root`; None if it does not."""
    place = root.joinpath(*name.split("."))
    for path in (place / "__init__.py", place.with_name(f"{place.name}.py")):
        if path.is_file():
            return path
    return None


def _imports(name: str, path: Path) -> Iterator[str]:
    """Dotted names that a module imports, wherever in it; some may be no modules."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    try:
        tree = ast.parse(path.read_bytes())
    except SyntaxError as error:
        raise ValueError(f"{path}: must be Python, but {error}") from error
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = node.module or ""
            if node.level:
                outer = package.split(".")
                start = ".".join([*outer[: len(outer) - node.level + 1], *filter(None, [start])])
            yield start
            yield from (f"{start}.{alias.name}" for alias in node.names)


def _essence(path: Path) -> str:
    """A module's text without comments and blank lines outside of strings."""
    with tokenize.open(path) as stream:
        text = stream.read()
    lines, blank = text.splitlines(), set[int]()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        row, column = token.start
        if token.type == tokenize.COMMENT:
            lines[row - 1] = lines[row - 1][:column].rstrip()
        if token.type in (tokenize.COMMENT, tokenize.NL) and not lines[row - 1].strip():
            blank.add(row - 1)
    return "\n".join(line for number, line in enumerate(lines) if number not in blank)
