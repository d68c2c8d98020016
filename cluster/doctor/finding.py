"""One answer of the doctor."""

from dataclasses import dataclass
from pathlib import Path

GIB = 1024**3
TIMEOUT_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The answer to one question. `remedy` is empty exactly when the machine is fine."""

    name: str
    ok: bool
    found: str
    remedy: str = ""

    def __post_init__(self) -> None:
        assert self.ok != bool(self.remedy), f"{self.name}: a remedy belongs to what is wrong"


def nearest_directory(path: Path) -> Path:
    """Return `path`, or its nearest parent that exists: a check leaves no new folders behind."""
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.is_dir())


def reason(error: Exception) -> str:
    """Return an error in one line, with its kind when it says nothing else."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__
