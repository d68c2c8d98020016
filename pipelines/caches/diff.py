"""What two caches have in common and what not: settings, units, samples, and the numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice, zip_longest
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Literal

from pipelines.caches.lookup import Found, only_stage, stages_of_run
from pipelines.errors import UserError
from pipelines.stage import File, Receipt
from pipelines.store.fingerprint import changed_parts, changes
from pipelines.store.ledger import Ledger

if TYPE_CHECKING:
    from torch import Tensor

NUM_UNITS_SHOWN = 10
TENSORS_EXTENSION = "safetensors"

Kind = Literal["added", "removed", "changed"]


@dataclass(frozen=True, kw_only=True)
class UnitChange:
    """One unit that is not the same on both sides; `before` or `after` is None where absent."""

    kind: Kind
    unit: str
    why: str
    before: Receipt | None
    after: Receipt | None


@dataclass
class UnitChanges:
    """All units counted, the first few of those that differ kept."""

    counts: Counter[str] = field(default_factory=Counter)  # same, added, removed, changed
    first: list[UnitChange] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class SampleChange:
    """One sample of a changed unit whose members differ; safetensors are kept to compare."""

    kind: Kind
    unit: str
    key: str
    extensions: tuple[str, ...]  # that differ
    before: bytes = b""
    after: bytes = b""


@dataclass
class TensorDifference:
    """How far one tensor of the samples has moved: over all samples that were compared."""

    num_compared: int = 0
    num_other_shape: int = 0
    max_abs: float = 0.0
    min_cosine: float = 1.0
    sum_cosine: float = 0.0

    @property
    def mean_cosine(self) -> float:
        return self.sum_cosine / self.num_compared if self.num_compared else 1.0


def resolve(ledger: Ledger, text: str) -> dict[str, Found]:
    """The stages that a run id, or a stage's fingerprint, names; a beginning will do.

    Raises:
        UserError: it names nothing, or more than one thing.
    """
    if any(record["run_id"].startswith(text) for record in ledger.runs()):
        return stages_of_run(ledger, ledger.run(text))
    try:
        found = only_stage(ledger, text)
    except UserError as error:
        raise UserError(f"no run begins with {text!r}; {error}") from error
    return {found.name: found}


def pair_stages(
    before: Mapping[str, Found], after: Mapping[str, Found]
) -> list[tuple[Found, Found]]:
    """Stages to hold against each other: those of one name, or two that were named one by one.

    Raises:
        UserError: no stage stands on both sides.
    """
    if len(before) == len(after) == 1:
        return [(next(iter(before.values())), next(iter(after.values())))]
    names = [name for name in before if name in after]
    if not names:
        raise UserError(
            f"nothing to compare: one side has {', '.join(before) or 'no stage'}, "
            f"the other {', '.join(after) or 'none'}"
        )
    return [(before[name], after[name]) for name in names]


def settings_that_differ(before: Found, after: Found) -> list[str]:
    """One line a setting: `config.max_tokens: 77 -> 64`."""
    return changes(before.identity(), after.identity())


# -- units ----------------------------------------------------------------------------------------


def compare_units(before: Found, after: Found) -> UnitChanges:
    """Walk through the receipts of both, side by side; memory holds those out of step."""
    found = UnitChanges()
    for change in unit_changes(before.receipts(), after.receipts(), found.counts):
        if len(found.first) < NUM_UNITS_SHOWN:
            found.first.append(change)
    return found


def unit_changes(
    before: Iterable[Receipt], after: Iterable[Receipt], counts: Counter[str]
) -> Iterator[UnitChange]:
    """Every unit that differs; all are counted."""
    for old, new in _paired(before, after):
        if old is None:
            assert new is not None
            change = UnitChange(kind="added", unit=new.unit, why="", before=None, after=new)
        elif new is None:
            change = UnitChange(kind="removed", unit=old.unit, why="", before=old, after=None)
        elif why := _what_differs(old, new):
            change = UnitChange(kind="changed", unit=old.unit, why=why, before=old, after=new)
        else:
            counts["same"] += 1
            continue
        counts[change.kind] += 1
        yield change


def _paired(
    before: Iterable[Receipt], after: Iterable[Receipt]
) -> Iterator[tuple[Receipt | None, Receipt | None]]:
    """Receipts of the same unit together; those that only one side has come last."""
    old_alone: dict[str, Receipt] = {}
    new_alone: dict[str, Receipt] = {}
    for old, new in zip_longest(before, after):
        if old is not None:
            old_alone[old.unit] = old
        if new is not None:
            new_alone[new.unit] = new
        for one in (old, new):
            if one is not None and one.unit in old_alone and one.unit in new_alone:
                yield old_alone.pop(one.unit), new_alone.pop(one.unit)
    yield from ((old, None) for old in old_alone.values())
    yield from ((None, new) for new in new_alone.values())


def _what_differs(old: Receipt, new: Receipt) -> str:
    """What a unit made differently, and the inputs or settings behind it; "" for the same bytes."""
    old_files, new_files = _digests(old), _digests(new)
    words = []
    if old.num_out != new.num_out:
        words.append(f"{old.num_out:,} -> {new.num_out:,} samples")
    names = old_files.keys() | new_files.keys()
    if files := sorted(name for name in names if old_files.get(name) != new_files.get(name)):
        words.append(", ".join(files))
    if not words:
        return ""
    parts = changed_parts(old.key, new.key) if old.key and new.key else []
    return "; ".join([f"{', '.join(parts)} changed"] * bool(parts) + words)


def _digests(receipt: Receipt) -> dict[str, str]:
    """By name alone: an adopted file may lie anywhere."""
    return {PurePosixPath(file.path).name: file.sha256 for file in receipt.files}


# -- samples --------------------------------------------------------------------------------------


def sample_changes(before: Found, after: Found) -> Iterator[SampleChange]:
    """Samples that differ, by key, of every changed unit that holds a tar."""
    for change in unit_changes(before.receipts(), after.receipts(), Counter()):
        if change.before is None or change.after is None:
            continue
        old, new = _tar(change.before), _tar(change.after)
        if old is not None and new is not None and old.sha256 != new.sha256:
            yield from _compare_tars(change.unit, before, old, after, new)


def _tar(receipt: Receipt) -> File | None:
    return next((file for file in receipt.files if file.path.endswith(".tar")), None)


def _compare_tars(
    unit: str, before: Found, old_file: File, after: Found, new_file: File
) -> Iterator[SampleChange]:
    from ediffi.storage.tar_index import MappedTar

    with (
        closing(MappedTar(before.local_path(old_file))) as old,
        closing(MappedTar(after.local_path(new_file))) as new,
    ):
        old_index, new_index = old.index(), new.index()
        for key, members in old_index.items():
            if key not in new_index:
                yield SampleChange(kind="removed", unit=unit, key=key, extensions=tuple(members))
                continue
            others = new_index[key]
            differ = tuple(
                name
                for name in sorted(members.keys() | others.keys())
                if name not in members
                or name not in others
                or old.read(members[name]) != new.read(others[name])
            )
            if differ:
                has_tensors = TENSORS_EXTENSION in differ and (
                    TENSORS_EXTENSION in members and TENSORS_EXTENSION in others
                )
                yield SampleChange(
                    kind="changed",
                    unit=unit,
                    key=key,
                    extensions=differ,
                    before=old.read(members[TENSORS_EXTENSION]) if has_tensors else b"",
                    after=new.read(others[TENSORS_EXTENSION]) if has_tensors else b"",
                )
        for key in new_index.keys() - old_index.keys():
            added = tuple(new_index[key])
            yield SampleChange(kind="added", unit=unit, key=key, extensions=added)


# -- numbers --------------------------------------------------------------------------------------


def compare_values(
    samples: Iterable[SampleChange], num_samples: int
) -> dict[str, TensorDifference]:
    """Numeric difference by tensor, over the first samples whose tensors differ.

    int8 tokens are compared as what a reader gets of them. A cosine is one of two tokens, or of
    two pooled vectors; the mean is over samples of their mean.
    """
    from ediffi.encoding.quantization import dequantize
    from ediffi.storage.shard_format import decode_tensors

    differences: dict[str, TensorDifference] = {}
    with_values = (sample for sample in samples if sample.before)
    for sample in islice(with_values, num_samples):
        old = dequantize(decode_tensors(sample.before))
        new = dequantize(decode_tensors(sample.after))
        for name in sorted(old.keys() & new.keys()):
            _add(differences.setdefault(name, TensorDifference()), old[name], new[name])
    return differences


def _add(difference: TensorDifference, old: Tensor, new: Tensor) -> None:
    from torch.nn.functional import cosine_similarity

    if old.shape != new.shape:
        difference.num_other_shape += 1
        return
    one, other = old.double(), new.double()
    cosine = cosine_similarity(one, other, dim=-1)
    difference.num_compared += 1
    difference.max_abs = max(difference.max_abs, float((one - other).abs().max()))
    difference.min_cosine = min(difference.min_cosine, float(cosine.min()))
    difference.sum_cosine += float(cosine.mean())
