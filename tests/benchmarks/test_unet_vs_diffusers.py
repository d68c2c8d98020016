"""Both networks of the comparison have equal parameters and work; ours is the recipe's."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from benchmarks.peers import ours_unet
from benchmarks.peers.unet_step import case_of, inputs
from benchmarks.unet_vs_diffusers import CASES, NUM_TOKENS, check_parameters
from pipelines import recipes

TINY = replace(CASES[0], ours=(32, 32, 32), batch_images=2, num_steps=1)


def test_first_case_is_the_network_of_the_emoji_recipe() -> None:
    """The sizes written out in the benchmark are those of the recipe."""
    path = Path(recipes.__path__[0]) / "emoji-32px.yaml"
    recipe = yaml.safe_load(path.read_text())
    names = {"widths": "ours", "embedding_width": ""}
    for name, value in recipe["network"].items():
        if field := names.get(name, name):
            found = getattr(CASES[0], field)
            assert (list(found) if isinstance(found, tuple) else found) == value, name
    assert ours_unet._config(CASES[0]).embedding_width == recipe["network"]["embedding_width"]


def test_unequal_networks_are_refused() -> None:
    """More than two per cent apart is too much; the error names side and number."""
    check_parameters({"ours": 1_000_000, "a": 1_019_000})
    with pytest.raises(ValueError, match="a must have our 1,000,000 parameters"):
        check_parameters({"ours": 1_000_000, "a": 1_030_000})


def test_captions_differ_in_length() -> None:
    """From half of the tokens to all are real, in every case."""
    for case in CASES:
        lengths_B = inputs(case).mask_BT.sum(dim=1)
        assert lengths_B.min() >= NUM_TOKENS // 2
        assert lengths_B.max() <= NUM_TOKENS


def test_our_side_answers() -> None:
    """A network is built from what came over the line, counted, and timed."""
    session = ours_unet.Session()
    fields = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(TINY).items()}
    assert case_of(fields) == TINY
    about = session.handle(
        action="build", case=fields, blocks="ours", precision="bf16", num_threads=1
    )
    assert about["num_parameters"] > 0
    assert about["image_gflop"] > 0
    assert session.handle(action="measure")["seconds"] > 0
