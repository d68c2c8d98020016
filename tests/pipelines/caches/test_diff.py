"""Tests of pipelines.caches.diff: units, samples and numbers that differ, and those that do not."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch

from ediffi.encoding.quantization import quantize_tokens
from ediffi.storage.shard_format import ShardWriter, encode_tensors
from pipelines.caches.diff import (
    compare_units,
    compare_values,
    pair_stages,
    resolve,
    sample_changes,
    settings_that_differ,
    unit_changes,
)
from pipelines.caches.lookup import Found
from pipelines.errors import UserError
from pipelines.planning import plan
from pipelines.recipe import Recipe
from pipelines.stage import File, Outcome, Receipt, Unit
from pipelines.store.ledger import Ledger
from pipelines.store.stage_record import StageRecord
from tests.pipelines.fake_stages import FakeStage, finish, receipt, write_run

Tensors = Mapping[str, torch.Tensor]


def made(unit: str, text: str = "", key: str = "", num_out: int = 1) -> Receipt:
    file = File(path=f"{unit}.tar", sha256=text or unit, num_bytes=1)
    return receipt(unit, files=(file,), key=key, num_out=num_out)


def stage(
    folder: Path, samples: Mapping[str, Mapping[str, bytes]], name: str = "embed/t5"
) -> Found:
    """A finished stage with one unit whose tar has these samples."""
    record = StageRecord(folder)
    record.open({"version": 1, "config": {}, "input": {}}, {})
    scratch = folder.parent / "scratch"
    scratch.mkdir(exist_ok=True)
    with ShardWriter(scratch / "a.tar") as writer:
        for key, members in samples.items():
            writer.write(key, members)
    record.publish(Unit(id="a"), Outcome(files=["a.tar"]), scratch, seconds=1, attempt=1)
    record.complete(name, {}, {}, {}, ["a"], "run-1")
    return Found(name=name, record=record)


def test_units_are_told_apart_by_what_they_made() -> None:
    """A unit that has other files, or other samples, has changed; another key alone is none."""
    before = [made("a"), made("b", key="rows:1"), made("c"), made("d", num_out=2), made("e")]
    after = [made("a", key="rows:9"), made("b", "x", key="rows:2"), made("d"), made("f"), made("e")]
    counts: Counter[str] = Counter()
    found = {one.unit: (one.kind, one.why) for one in unit_changes(before, after, counts)}
    assert counts == {"same": 2, "changed": 2, "added": 1, "removed": 1}
    assert found == {
        "b": ("changed", "rows changed; b.tar"),
        "d": ("changed", "2 -> 1 samples"),
        "c": ("removed", ""),
        "f": ("added", ""),
    }


def test_memory_holds_only_units_out_of_step() -> None:
    """A unit more at the front of one side does not make the other wait for the end."""
    num_read = 0

    def counted() -> Iterator[Receipt]:
        nonlocal num_read
        for index in range(1000):
            num_read += 1
            yield made(f"{index}")

    def longer() -> Iterator[Receipt]:
        yield made("null")
        yield from (made(f"{index}", "other" if index == 10 else "") for index in range(1000))

    first = next(iter(unit_changes(counted(), longer(), Counter())))
    assert (first.unit, first.kind) == ("10", "changed")
    assert num_read < 20


def test_runs_and_fingerprints_are_resolved(
    ledger: Ledger, demo_recipe: Recipe, use_stages: Callable[..., None]
) -> None:
    """A run gives its stages by name, a fingerprint one; anything else is an error."""
    use_stages(FakeStage(name="ingest"), FakeStage(name="embed/t5", needs=("ingest",)))
    planned = plan(demo_recipe, ledger)
    for one in planned:
        finish(one)
    rows = [{"name": one.name, "fingerprint": one.fingerprint} for one in planned]
    write_run(ledger, "demo-20260101", stages=rows)
    run = resolve(ledger, "demo-2026")
    alone = resolve(ledger, planned[1].fingerprint[:5])
    assert (list(run), list(alone)) == (["ingest", "embed/t5"], ["embed/t5"])
    assert [(a.name, b.name) for a, b in pair_stages(run, alone)] == [("embed/t5", "embed/t5")]
    with pytest.raises(UserError, match="no run begins with 'zzzz'; no stage or fingerprint"):
        resolve(ledger, "zzzz")
    with pytest.raises(UserError, match="one side has ingest, embed/t5, the other none"):
        pair_stages(run, {})


def test_settings_that_differ_are_named(
    ledger: Ledger, demo_recipe: Recipe, use_stages: Callable[..., None]
) -> None:
    """As in a plan."""
    found = []
    for setting in (1, 2):
        use_stages(FakeStage(name="ingest", setting=setting))
        (planned,) = plan(demo_recipe, ledger)
        finish(planned, {"a": {"a.txt": str(setting)}})
        found.append(Found(name="ingest", record=planned.record))
    assert settings_that_differ(*found) == ["config.setting: 1 -> 2"]
    assert compare_units(*found).counts == {"changed": 1}


def test_samples_of_changed_units_are_compared_by_key(tmp_path: Path) -> None:
    """Changed, removed and added samples, with the members that differ; equal ones are left out."""
    before = stage(
        tmp_path / "a" / "01", {"k1": {"txt": b"a"}, "k2": {"txt": b"b"}, "k3": {"txt": b"c"}}
    )
    after = stage(
        tmp_path / "b" / "01", {"k1": {"txt": b"a"}, "k3": {"txt": b"C"}, "k4": {"txt": b"d"}}
    )
    found = [(one.key, one.kind, one.extensions) for one in sample_changes(before, after)]
    assert found == [
        ("k2", "removed", ("txt",)),
        ("k3", "changed", ("txt",)),
        ("k4", "added", ("txt",)),
    ]
    assert list(sample_changes(before, before)) == []


def test_numbers_are_compared_as_a_reader_gets_them(tmp_path: Path) -> None:
    """int8 against bf16 tokens: a small difference is told small; other lengths are counted."""
    tokens = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    quantized, scale = quantize_tokens(tokens)
    pooled = torch.tensor([1.0, 0.0])

    def members(tensors: Tensors) -> dict[str, bytes]:
        return {"safetensors": encode_tensors(tensors)}

    before = stage(
        tmp_path / "a" / "01",
        {
            "k1": members({"tokens": tokens.bfloat16(), "pooled": pooled}),
            "k2": members({"tokens": tokens.bfloat16()}),
        },
    )
    after = stage(
        tmp_path / "b" / "01",
        {
            "k1": members({"tokens": quantized, "tokens_scale": scale, "pooled": -pooled}),
            "k2": members({"tokens": tokens[:3].bfloat16()}),
        },
    )
    found = compare_values(sample_changes(before, after), 10)
    assert found["tokens"].num_compared == 1
    assert found["tokens"].num_other_shape == 1
    assert 0.999 < found["tokens"].min_cosine <= found["tokens"].mean_cosine < 1
    assert 0 < found["tokens"].max_abs < 0.05
    assert (found["pooled"].min_cosine, found["pooled"].max_abs) == (-1.0, 2.0)
    assert compare_values(sample_changes(before, after), 1)["tokens"].num_other_shape == 0
