"""What the embedding benchmarks encode: lengths like COCO's, and a stage's own records."""

import statistics

import pytest

from benchmarks.embed_content import WORDS, Folders, captions, write_all
from ediffi.encoders import EncoderConfig, load_encoder
from ediffi.storage.shard_format import read_shard
from pipelines.stage import Manifest


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Encoders and two small shards."""
    folders = Folders(root=tmp_path_factory.mktemp("content"))
    write_all(folders, num_samples=5, shard_samples=3)
    return folders


def test_captions_are_as_long_as_those_of_coco() -> None:
    """The median is 13 tokens with T5's end token, few exceed 25, and they are always the same."""
    texts = list(captions(2000))
    lengths = [len(text.split()) + 1 for text in texts]
    assert statistics.median(lengths) == 13
    assert sum(length > 25 for length in lengths) / 2000 < 0.01
    assert list(captions(2000)) == texts
    assert len(set(WORDS)) == len(WORDS)


def test_the_shards_are_a_finished_stage(folders: Folders) -> None:
    """The stage reads them as it reads what ingest has made."""
    manifest = Manifest.load(folders.shards)
    assert [(receipt.unit, receipt.num_out) for receipt in manifest.receipts] == [
        ("train-00000", 3),
        ("train-00001", 2),
    ]
    keys = [key for key, _ in read_shard(folders.shards / "train-00001.tar")]
    assert keys == ["00000003", "00000004"]


def test_every_word_is_one_token_for_both_tokenizers(folders: Folders) -> None:
    """So that both encoders see the lengths that the benchmark speaks of."""
    text = " ".join(WORDS[:20])
    t5 = load_encoder(EncoderConfig(family="transformers", weights=str(folders.t5)))
    clip = load_encoder(EncoderConfig(family="open_clip_text", weights=str(folders.clip)))
    assert t5.tokenize([text]).num_tokens == [21]  # type: ignore[attr-defined]
    assert clip.tokenize([text]).num_tokens == [22]  # type: ignore[attr-defined]
