"""Checks of the fields of profiles and jobs: each error names the field, the rule and the value."""

import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar

# A label of the domain name system: what Kubernetes, Slurm and Ray all accept as a name.
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# Which names of variables tell secrets: as in `pipelines.masking`, which cannot be imported here.
SECRET_PARTS = {
    "APIKEY",
    "AUTH",
    "AUTHORIZATION",
    "CREDENTIAL",
    "CREDENTIALS",
    "KEY",
    "PASS",
    "PASSPHRASE",
    "PASSWD",
    "PASSWORD",
    "PAT",
    "PWD",
    "SECRET",
    "SECRETS",
    "TOKEN",
    "WEBHOOK",
}
SECRET_ENDS = (  # of a part, as in PGPASSWORD
    *("ACCESSKEY", "APIKEY", "CREDENTIALS", "PASSPHRASE"),
    *("PASSWD", "PASSWORD", "PRIVATEKEY", "SECRET", "TOKEN"),
)
HARMLESS_ENDS = {"FILE", "HOST", "ID", "LOCATION", "MODE", "NAME", "PATH", "TYPE", "USERNAME"}
_PASSWORD_IN_URL = re.compile(r"://[^/@\s:]*:[^/@\s]+@|\bhttps?://[^/@\s:]+@", re.IGNORECASE)
_Record = TypeVar("_Record")


def build(cls: type[_Record], values: object, where: str, **given: Any) -> _Record:
    """Make a dataclass from parsed YAML.

    Args:
        where: how the section is called in messages; "" for the whole file.
        given: fields that the YAML must not state.

    Raises:
        ValueError: unknown or missing fields, or what the class itself refuses.
    """
    at = f"{where}: " if where else ""
    if not isinstance(values, Mapping):
        found = type(values).__name__
        raise ValueError(f"{where or 'the file'} must hold a mapping of fields, got {found}")
    known = {f.name: f for f in dataclasses.fields(cls) if f.name not in given}  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known fields: {', '.join(known)}"
            raise ValueError(f"{at}unknown field {key!r}: {hint}")
    for key, one in known.items():
        has_default = (one.default, one.default_factory) != (dataclasses.MISSING,) * 2
        if not has_default and key not in values:
            raise ValueError(f"{at}missing field {key!r}: it must be stated")
    try:
        return cls(**given, **values)
    except ValueError as error:
        raise ValueError(f"{at}{error}") from error


def check_name(what: str, name: object) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(
            f"{what} must be 1 to 63 lower-case letters, digits and inner hyphens, got {name!r}"
        )


def check_count(what: str, value: object, *, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{what} must be a whole number of at least {minimum}, got {value!r}")


def check_amount(what: str, value: object, unit: str, *, zero: bool = False) -> None:
    """A finite number above zero, or also zero."""
    ok = not isinstance(value, bool) and isinstance(value, (int, float)) and value < 1e12
    if not ok or not (value > 0 or (zero and value == 0)):  # type: ignore[operator]
        rule = "a number of at least 0" if zero else "a positive number"
        raise ValueError(
            f"{what} must be {rule} {unit}, got {value!r}: write 24, no unit behind it"
        )


def check_limit_s(what: str, value: object) -> None:
    """Seconds, or the word none."""
    if value != "none":
        try:
            check_count(what, value, minimum=1)
        except ValueError:
            raise ValueError(
                f"{what} must be whole seconds above 0, or the word none, got {value!r}"
            ) from None


def check_choice(what: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        close = difflib.get_close_matches(str(value), choices, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"{what} must be one of {', '.join(choices)}, got {value!r}{hint}")


def check_flag(what: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{what} must be true or false, got {value!r}")


def text(what: str, value: object) -> str:
    if not isinstance(value, str) or any(character in value for character in "\0\n\r"):
        raise ValueError(f"{what} must be text on one line, got {value!r}")
    return value


def texts(what: str, value: object) -> tuple[str, ...]:
    """A tuple of text; one text alone is most likely a list that was forgotten."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ValueError(f"{what} must be a list of texts, got {value!r}: write [ ... ]")
    return tuple(text(what, one) for one in value)


def text_map(what: str, value: object) -> Mapping[str, str]:
    """A read-only copy. YAML reads `off` as False and `1` as a number: ask for quotes."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{what} must map names to text, got {value!r}")
    for key, one in value.items():
        if not isinstance(key, str) or not key:
            raise ValueError(f"{what}: {key!r} is no name: put it in quotes")
        if not isinstance(one, str):
            raise ValueError(
                f'{what}.{key} must be text, got {one!r}: write {key}: "..." with quotes'
            )
        text(f"{what}.{key}", one)
    return MappingProxyType(dict(value))


def variable_name(what: str, value: object) -> str:
    if not isinstance(value, str) or not _VARIABLE.fullmatch(value):
        raise ValueError(f"{what}: {value!r} is no name of an environment variable")
    return value


def environment(what: str, value: object) -> Mapping[str, str]:
    """Variables and their values, none of which may be a secret."""
    variables = text_map(what, value)
    for key, one in variables.items():
        variable_name(what, key)
        if looks_secret(key, one):
            raise ValueError(
                f"{what}.{key} looks like a secret, which has no place in a profile: name the "
                "variable in pass_environment, or in kuberay.secret_variables"
            )
    return variables


def looks_secret(name: str, value: str) -> bool:
    """Whether a variable is to be kept out of files: by its name, or as a URL with a password."""
    return is_secret_name(name) or _PASSWORD_IN_URL.search(value) is not None


def is_secret_name(name: str) -> bool:
    """Whether an environment variable of this name holds a secret."""
    parts = name.upper().split("_")
    if parts == ["PWD"] or parts[-1] in HARMLESS_ENDS:  # PWD is the shell's own directory
        return False
    return any(part in SECRET_PARTS or part.endswith(SECRET_ENDS) for part in parts)
