"""Embedding as a stage, and adopting a cache made elsewhere: units, receipts, refusals."""

import io
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ediffi.encoding.encoder_identity import CacheMismatch, read_identity
from ediffi.storage.shard_format import ShardWriter, decode_tensors, read_shard
from ediffi.storage.tar_index import ShardError, write_index
from pipelines.errors import StageFailed, UserError
from pipelines.recipe import Encoder
from pipelines.stage import File, Manifest, Stage, Unit, Workspace
from pipelines.stages.embed import Embed
from pipelines.stages.embed_cache import AdoptCache
from pipelines.stages.ingestion.shard_digests import ShardDigests
from pipelines.stages.inputs import joined_shards
from pipelines.store.fingerprint import changed_parts, file_sha256
from pipelines.store.stage_record import StageRecord
from tests.pipelines.fake_stages import manifest, receipt
from tests.tiny_encoders import write_clip, write_t5

WORDS = ("red", "green", "blue", "disk")
CAPTIONS = ("red disk", "green", "blue blue disk", "disk")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `t5` and `clip`."""
    folder = tmp_path_factory.mktemp("models")
    write_t5(folder / "t5", WORDS)
    write_clip(folder / "clip")
    return folder


@pytest.fixture
def t5(models: Path) -> Encoder:
    """The recipe's words for the T5."""
    return Encoder(family="transformers", weights=str(models / "t5"), max_tokens=12)


@pytest.fixture
def ingest(tmp_path: Path) -> Callable[..., Manifest]:
    """A finished ingest of shards `train-00000`, `train-00001`, ... with these captions."""

    def write(*shards: tuple[str, ...], folder: str = "ingest") -> Manifest:
        directory = tmp_path / folder
        directory.mkdir(exist_ok=True)
        receipts = []
        for number, captions in enumerate(shards):
            tar = directory / f"train-{number:05d}.tar"
            digests = ShardDigests()
            with ShardWriter(tar) as writer:
                for index, caption in enumerate(captions):
                    stream = io.BytesIO()
                    Image.new("RGB", (8, 8), (20 * index, number, 0)).save(stream, "PNG")
                    key = f"k{number}{index}"
                    writer.write(key, {"png": stream.getvalue(), "txt": caption.encode()})
                    digests.add(key, caption.encode(), stream.getvalue())
            write_index(tar, tar.with_suffix(".index.json"))
            files = [
                File(path=path.name, sha256=file_sha256(path), num_bytes=path.stat().st_size)
                for path in (tar, tar.with_suffix(".index.json"))
            ]
            facts = {"split": "train", "shard": tar.name, "digests": digests.facts()}
            num = len(captions)
            receipts.append(
                receipt(tar.stem, files=tuple(files), num_in=num, num_out=num, facts=facts)
            )
        return manifest(directory, *receipts)

    return write


def run_all(stage: Stage, directory: Path, inputs: Mapping[str, Manifest]) -> Manifest:
    """Do every unit of a stage and publish it, as the runner does."""
    record = StageRecord(directory)
    units = list(stage.plan(inputs))
    for number, unit in enumerate(units):
        scratch = directory / f"scratch-{number}"
        scratch.mkdir(parents=True)
        workspace = Workspace(scratch=scratch, durable=scratch, inputs=inputs)
        record.publish(unit, stage.run(unit, workspace), scratch, seconds=1.0, attempt=1)
    ids = [unit.id for unit in units]
    finished = record.complete(stage.name, stage.identity(), {}, {}, ids, "run-1")
    stage.check(finished.receipts)  # type: ignore[attr-defined]
    return finished


def keys_of(stage: Stage, inputs: Mapping[str, Manifest]) -> dict[str, str]:
    return {unit.id: unit.key for unit in stage.plan(inputs)}


def test_a_cache_has_a_tar_and_an_index_a_shard_and_says_what_made_it(t5, ingest, tmp_path):
    """Every shard has its like-named tar; the null embedding and encoder.json lie beside them."""
    inputs = {"ingest": ingest(CAPTIONS[:3], CAPTIONS[3:])}
    stage = Embed(encoder_name="t5", encoder=t5)
    cache = run_all(stage, tmp_path / "cache", inputs)
    assert [one.unit for one in cache.receipts] == ["null", "train-00000", "train-00001"]
    first = cache.receipt("train-00000")
    assert [file.path for file in first.files] == ["train-00000.tar", "train-00000.index.json"]
    assert (first.num_in, first.num_out) == (3, 3)
    assert first.facts["tokens"] == {"2": 1, "3": 1, "4": 1}
    assert first.facts["digests"] == {
        "captions": inputs["ingest"].receipt("train-00000").facts["digests"]["captions"]
    }
    assert {"encode_s", "device_idle_fraction"} <= first.timings.keys()
    assert read_identity(tmp_path / "cache") == stage.identity()
    null = decode_tensors((tmp_path / "cache" / "null.safetensors").read_bytes())
    assert null["tokens"].shape == (1, cache.receipt("null").facts["token_width"])
    keys = [key for key, _ in read_shard(tmp_path / "cache" / "train-00000.tar")]
    assert keys == ["k00", "k01", "k02"]
    shards = joined_shards({**inputs, "embed/t5": cache}, "train")
    assert [shard.num_samples for shard in shards] == [3, 1]


def test_a_unit_is_stale_by_what_it_reads_alone(models, t5, ingest):
    """A caption concerns its own shard's text embeddings, and no picture's."""
    before = {"ingest": ingest(CAPTIONS, CAPTIONS)}
    after = {"ingest": ingest(CAPTIONS, (*CAPTIONS[:3], "red"), folder="changed")}
    text = Embed(encoder_name="t5", encoder=t5)
    old, new = keys_of(text, before), keys_of(text, after)
    assert [unit for unit in old if old[unit] != new[unit]] == ["train-00001"]
    assert changed_parts(old["train-00001"], new["train-00001"]) == ["captions"]
    clip = Encoder(family="open_clip_image", weights=str(models / "clip"))
    image = Embed(encoder_name="clip_image", encoder=clip)
    assert keys_of(image, before) == keys_of(image, after)
    shorter = Embed(encoder_name="t5", encoder=t5.model_copy(update={"max_tokens": 9}))
    changed = keys_of(shorter, before)
    assert all(changed_parts(old[unit], changed[unit]) == ["settings"] for unit in old)
    generous = t5.model_copy(update={"dropout": 0.5, "max_rejects_fraction": 0.5})
    assert keys_of(Embed(encoder_name="t5", encoder=generous), before) == old


def test_a_shard_that_is_not_the_one_ingested_is_refused(t5, ingest, tmp_path):
    """A tar of another size, or with fewer samples than recorded, is not embedded."""
    inputs = {"ingest": ingest(CAPTIONS)}
    stage = Embed(encoder_name="t5", encoder=t5)
    unit = list(stage.plan(inputs))[1]
    workspace = Workspace(scratch=tmp_path, durable=tmp_path, inputs=inputs)
    few = replace(unit, arguments={**unit.arguments, "num_samples": 5})
    with pytest.raises(ShardError, match="must hold the 5 samples that were ingested, found 4"):
        stage.run(few, workspace)
    with (tmp_path / "ingest" / "train-00000.tar").open("ab") as stream:
        stream.write(bytes(512))
    with pytest.raises(ShardError, match=r"must be the \d+ bytes that were ingested, found \d+"):
        stage.run(unit, workspace)


def test_rejects_beyond_the_budget_fail_the_stage_with_a_report(t5, ingest, tmp_path):
    """The report counts every reason, names keys and says what to set."""
    inputs = {"ingest": ingest((*CAPTIONS, " ", "", "red " * 60))}
    strict = t5.model_copy(update={"too_long": "reject"})
    with pytest.raises(StageFailed) as caught:
        run_all(Embed(encoder_name="t5", encoder=strict), tmp_path / "strict", inputs)
    lines = str(caught.value).splitlines()
    assert lines[0] == (
        "embed/t5: 3 of 7 samples were rejected (42.9%), encoders.t5.max_rejects_fraction "
        "allows 0.0%"
    )
    assert lines[1:3] == ["  caption_empty: 2 (k04, k05)", "  caption_too_long: 1 (k06)"]
    lenient = strict.model_copy(update={"max_rejects_fraction": 0.5})
    cache = run_all(Embed(encoder_name="t5", encoder=lenient), tmp_path / "lenient", inputs)
    assert cache.totals.rejects == {"caption_empty": 2, "caption_too_long": 1}


def test_units_made_with_different_commits_fail_the_stage(t5):
    """A hub name that moved while the stage ran is told, with how to pin it."""
    encoder = t5.model_copy(update={"weights": "google/t5"})
    stage = Embed(encoder_name="t5", encoder=encoder)
    same = [receipt(name, facts={"revision": "aaa"}) for name in ("null", "train-00000")]
    stage.check(same)
    moved = receipt("train-00001", facts={"revision": "bbb"})
    with pytest.raises(
        StageFailed, match=r"(?s)different commits.*aaa: null, train-00000.*@COMMIT"
    ):
        stage.check([*same, moved])


@pytest.fixture
def cached(t5: Encoder, ingest: Callable[..., Manifest], tmp_path: Path) -> dict[str, Any]:
    """A finished ingest, a finished cache of it, and an encoder that names that cache."""
    inputs = {"ingest": ingest(CAPTIONS[:2], CAPTIONS[2:])}
    cache = run_all(Embed(encoder_name="t5", encoder=t5), tmp_path / "made", inputs)
    encoder = t5.model_copy(update={"cache": str(tmp_path / "made")})
    return {"inputs": inputs, "cache": cache, "encoder": encoder}


def test_a_cache_made_elsewhere_is_used_where_it_lies(cached, tmp_path):
    """Receipts name the tars by their absolute places; only the small null files are copied."""
    stage = AdoptCache(encoder_name="t5", encoder=cached["encoder"])
    adopted = run_all(stage, tmp_path / "adopted", cached["inputs"])
    for made, taken in zip(cached["cache"].receipts, adopted.receipts, strict=True):
        assert (taken.unit, taken.num_out, taken.facts) == (made.unit, made.num_out, made.facts)
        assert [file.sha256 for file in taken.files] == [file.sha256 for file in made.files]
    paths = [file.path for file in adopted.receipt("train-00000").files]
    assert paths == [
        str(tmp_path / "made" / name) for name in ("train-00000.tar", "train-00000.index.json")
    ]
    assert not list((tmp_path / "adopted").glob("*.tar"))
    assert read_identity(tmp_path / "adopted") == read_identity(tmp_path / "made")
    shards = joined_shards({**cached["inputs"], "embed/t5": adopted}, "train")
    assert [str(shard.embeddings["t5"].location) for shard in shards] == [
        str(tmp_path / "made" / f"train-0000{number}.tar") for number in range(2)
    ]


def test_a_cache_on_an_object_store_is_used_where_it_lies(cached, tmp_path, s3_store):
    """Receipts name the tars by URL, sizes are verified there."""
    from pipelines.store.location import location

    for path in (tmp_path / "made").rglob("*"):
        if path.is_file() and "scratch" not in str(path):
            target = location(f"{s3_store}/{path.relative_to(tmp_path / 'made')}")
            target.write_bytes(path.read_bytes())
    encoder = cached["encoder"].model_copy(update={"cache": s3_store})
    stage = AdoptCache(encoder_name="t5", encoder=encoder)
    adopted = run_all(stage, tmp_path / "adopted", cached["inputs"])
    first = adopted.receipt("train-00000").files[0]
    assert first.path == f"{s3_store}/train-00000.tar"
    location(f"{s3_store}/train-00000.tar").write_bytes(b"short")
    with pytest.raises(UserError, match=r"train-00000\.tar must have the recorded \d+ bytes"):
        run_all(stage, tmp_path / "again", cached["inputs"])


def test_a_cache_of_another_encoder_is_refused_by_field(cached):
    """The error names the setting, every field that differs, and both values."""
    other = cached["encoder"].model_copy(update={"max_tokens": 9, "pad": "keep"})
    with pytest.raises(CacheMismatch) as caught:
        AdoptCache(encoder_name="t5", encoder=other).identity()
    assert "encoders.t5.cache" in str(caught.value)
    assert "max_tokens: the cache has 12, asked is 9" in str(caught.value)
    assert "pad: the cache has 'drop', asked is 'keep'" in str(caught.value)
    assert "storage_dtype" not in str(caught.value)


def test_a_cache_of_other_samples_is_refused_by_shard(cached, ingest):
    """One changed caption, or a shard that the cache lacks, is named."""
    stage = AdoptCache(encoder_name="t5", encoder=cached["encoder"])
    other = ingest(CAPTIONS[:2], ("red", "disk"), folder="other")
    with pytest.raises(UserError, match=r"the captions of train-00001\.tar must be those"):
        list(stage.plan({"ingest": other}))
    more = ingest(CAPTIONS[:2], CAPTIONS[2:], ("red",), folder="more")
    with pytest.raises(UserError, match="holds nothing for 'train-00002'"):
        list(stage.plan({"ingest": more}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda tar: tar.write_bytes(tar.read_bytes()[:-512]), "must have the recorded .* bytes"),
        (
            lambda tar: tar.write_bytes(tar.read_bytes()[:-1] + b"x"),
            "must have the recorded sha256",
        ),
        (lambda tar: tar.unlink(), "is recorded there but absent"),
    ],
)
def test_a_damaged_cache_is_refused_by_file(damage, message, cached, tmp_path):
    """A tar that is short, altered or gone is named with what was required and found."""
    damage(tmp_path / "made" / "train-00001.tar")
    with pytest.raises(UserError, match=rf"train-00001\.tar {message}"):
        run_all(
            AdoptCache(encoder_name="t5", encoder=cached["encoder"]),
            tmp_path / "adopted",
            cached["inputs"],
        )


def test_an_unfinished_cache_is_refused(t5, tmp_path):
    """A folder without manifest is no cache; the error shows what one looks like."""
    encoder = t5.model_copy(update={"cache": str(tmp_path)})
    with pytest.raises(ValueError, match=r"encoders\.t5\.cache: must be the folder of a finished"):
        AdoptCache(encoder_name="t5", encoder=encoder).identity()


def test_a_unit_carries_all_that_a_worker_needs(t5, ingest):
    """Arguments are plain JSON: place, digest and size of the tar, and what to expect in it."""
    unit: Unit = list(Embed(encoder_name="t5", encoder=t5).plan({"ingest": ingest(CAPTIONS)}))[1]
    arguments = json.loads(json.dumps(dict(unit.arguments)))
    assert arguments["file"].keys() == {"path", "sha256", "num_bytes"}
    assert (arguments["shard"], arguments["num_samples"]) == ("train-00000.tar", 4)
    assert arguments["digests"].keys() == {"captions"}
