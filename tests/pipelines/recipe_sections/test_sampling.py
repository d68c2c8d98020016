"""Tests of recipe_sections.sampling: the section says what the library can do, and no more."""

import json
import math
from dataclasses import fields
from typing import Any

import pytest
from pydantic import ValidationError

from ediffi.cascade import PAPER_ENLARGING
from ediffi.sampling import SamplingConfig
from pipelines.recipe_sections.sampling import Enlarging, SamplerSettings, Sampling


def section(**values: Any) -> Sampling:
    """A section with one prompt."""
    return Sampling.model_validate({"prompts": ["a dot"], **values})


def test_sampling_section_covers_the_library() -> None:
    """Every field of the library's config can be said, with equal defaults; there are no others."""
    ours = {name: field.default for name, field in SamplerSettings.model_fields.items()}
    assert ours == {field.name: field.default for field in fields(SamplingConfig)}


def test_enlarging_defaults_are_the_papers() -> None:
    """A recipe that says nothing enlarges as the library does when nothing is said."""
    assert Enlarging().config() == PAPER_ENLARGING


def test_the_librarys_config_gets_every_value() -> None:
    """What a recipe says arrives; infinity and pairs too."""
    said = {
        "sampler": "heun",
        "num_steps": 3,
        "guidance": 4.0,
        "guidance_interval": [0.5, "inf"],
        "guidance_rescale": 0.5,
        "dynamic_threshold": 0.9,
        "churn": 10.0,
        "churn_sigma_min": 0.1,
        "churn_sigma_max": 9.0,
        "churn_noise": 1.01,
        "sigma_min": 0.01,
        "sigma_max": 40.0,
        "rho": 5.0,
        "batch_pictures": 2,
    }
    config = section(**said).config()
    assert vars(config) == {**said, "guidance_interval": (0.5, math.inf)}


def test_a_section_survives_json() -> None:
    """Records of runs are strict JSON: infinity is written, and read back as it was."""
    told = section(
        styles=[{"prompt": "a dot", "reference": "a.png"}],
        paintings=[{"prompt": "a dot", "painting": "b.png", "phrases": {"#ff0000": "dot"}}],
    )
    text = json.dumps(told.model_dump(mode="json"), allow_nan=False)
    assert Sampling.model_validate(json.loads(text)) == told


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sigma_min": 80.0}, "sigma_min must be below sigma_max"),
        ({"guidance_interval": [2, 1]}, "guidance_interval must be two rising noise levels"),
        ({"guidance_interval": [0, math.nan]}, "guidance_interval"),
        ({"guidance_rescale": 1.5}, "guidance_rescale"),
        ({"dynamic_threshold": -0.5}, "dynamic_threshold"),
        ({"churn_sigma_min": 3, "churn_sigma_max": 2}, "churn_sigma_min must be at most"),
        ({"churn": 1.0, "sampler": "deis"}, "churn must be 0 with sampler 'deis', got 1.0"),
        ({"seeds": []}, "seeds"),
        ({"seeds": [-1]}, "seeds must not be negative, got -1"),
        ({"enlarging": {"churn": 1.0}}, "churn must be 0 with sampler 'deis'"),
        ({"enlarging": {"prompts": ["a"]}}, "enlarging.prompts"),
        ({"styles": [{"prompt": "a"}]}, "styles.0.reference"),
        ({"paintings": [{"prompt": "a", "painting": "p", "phrases": {"red": "a"}}]}, "phrases.red"),
    ],
)
def test_what_the_library_would_refuse_is_refused_by_the_recipe(
    values: dict[str, Any], message: str
) -> None:
    """Before anything starts, under the field's name."""
    with pytest.raises(ValidationError, match=message):
        section(**values)
