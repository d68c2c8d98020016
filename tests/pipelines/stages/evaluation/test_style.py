"""Which drawings test a style: prompts, references and labels."""

import pytest
import torch

from pipelines.stages.evaluation.material import PictureSet
from pipelines.stages.evaluation.style import confusion, labels_of, plan_drawings, prompts_of

LABELS = ["flat", "flat", "flat", "inked"] * 2


def pictures() -> PictureSet:
    """Eight pictures of four things in two styles."""
    captions = tuple(f"thing {index // 2}" for index in range(8))
    samples = tuple(
        {"style": label, "plain": caption.upper()} for label, caption in zip(LABELS, captions)
    )
    return PictureSet(torch.zeros(8, 3, 4, 4, dtype=torch.uint8), captions, samples)


def test_every_prompt_is_drawn_in_every_style_from_one_noise() -> None:
    """Styles alternate, seeds and prompts change with each round of styles."""
    prompts = prompts_of(pictures(), "")
    drawings = plan_drawings(pictures(), LABELS, prompts, num=6, seed=10)
    assert [(one.prompt, one.style, one.seed) for one in drawings] == [
        ("thing 0", "flat", 10),
        ("thing 0", "inked", 10),
        ("thing 1", "flat", 11),
        ("thing 1", "inked", 11),
        ("thing 2", "flat", 12),
        ("thing 2", "inked", 12),
    ]


def test_references_have_the_style_and_go_round() -> None:
    """Every picture of a style is used before one comes again."""
    drawings = plan_drawings(pictures(), LABELS, ["a"], num=12, seed=0)
    assert all(LABELS[one.reference_index] == one.style for one in drawings)
    flat = [one.reference_index for one in drawings if one.style == "flat"]
    assert sorted(flat) == [index for index, label in enumerate(LABELS) if label == "flat"]
    assert flat[0] != 0  # not the picture whose caption comes first


def test_fewer_drawings_than_styles_test_nothing() -> None:
    """Each style must be drawn at least once."""
    with pytest.raises(ValueError, match="at least the number of styles, 2, got 1"):
        plan_drawings(pictures(), LABELS, ["a"], num=1, seed=0)


def test_columns_are_found_or_named() -> None:
    """Labels and prompts come from the samples' JSON; a missing column is said with the others."""
    assert labels_of(pictures(), "style") == LABELS
    assert prompts_of(pictures(), "plain") == ["THING 0", "THING 1", "THING 2", "THING 3"]
    with pytest.raises(ValueError, match=r"style\.column: .* got 'stile'; they have: style, plain"):
        labels_of(pictures(), "stile")
    with pytest.raises(ValueError, match=r"style\.caption_column: .* got 'bare'"):
        prompts_of(pictures(), "bare")


def test_confusion_counts_pairs() -> None:
    """Rows are what was wanted, columns what was found."""
    found = confusion(["a", "a", "b"], ["a", "b", "b"], ("a", "b", "c"))
    assert found == {
        "a": {"a": 1, "b": 1, "c": 0},
        "b": {"a": 0, "b": 1, "c": 0},
        "c": {"a": 0, "b": 0, "c": 0},
    }
