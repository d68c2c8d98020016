"""Tests of pipelines.commands.sample: `ediffi sample`, from options to PNGs."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import ArgumentParser
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ediffi
from ediffi.cascade import PAPER_ENLARGING
from ediffi.painting import DEFAULT_STRENGTH, Painting
from ediffi.sampling import SamplingConfig
from pipelines.commands import sample as command
from pipelines.errors import UserError
from tests.tiny_generator import write_generator

Run = Callable[..., tuple[int, str, str]]
FAST = ("--sampler", "dpm++2m", "--steps", "2", "--enlarging", "num_steps=1")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ensemble of 8 px that hears T5, and a cascade to 16 px."""
    path = tmp_path_factory.mktemp("model") / "ensemble"
    return write_generator(path, streams=("t5",), sizes_px=(16,))


@pytest.fixture(scope="module")
def deaf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ensemble of 8 px without streams."""
    return write_generator(tmp_path_factory.mktemp("deaf") / "ensemble", streams=())


@pytest.fixture
def painting(tmp_path: Path) -> Path:
    """Red at the left, white at the right."""
    canvas = Image.new("RGB", (8, 8), "white")
    canvas.paste((255, 0, 0), (0, 0, 4, 8))
    canvas.save(tmp_path / "painting.png")
    return tmp_path / "painting.png"


def parsed(*words: str) -> command.Namespace:
    """Options as the command gets them."""
    parser = ArgumentParser()
    command.sample_options(parser)
    return parser.parse_args(["model", "--prompt", "a dot", *words])


def test_every_prompt_is_drawn_with_every_seed(ediffi: Run, model: Path, tmp_path: Path) -> None:
    """Each picture is named by prompt and seed, is what the library draws, and its path printed."""
    words = ["--prompt", "a red circle", "--prompt", "a blue square", "--seed", "5", "--seed", "6"]
    code, out, err = ediffi("sample", str(model), *words, *FAST, "--out", str(tmp_path / "out"))
    names = ["000-seed5.png", "000-seed6.png", "001-seed5.png", "001-seed6.png"]
    assert (code, out.splitlines()) == (0, [str(tmp_path / "out" / name) for name in names])
    assert err.splitlines()[-1] == "4 of 4 pictures"
    expected = load(model).generate(
        ["a red circle", "a red circle", "a blue square", "a blue square"],
        seeds=[5, 6, 5, 6],
        config=SamplingConfig(sampler="dpm++2m", num_steps=2),
        enlarging=SamplingConfig(sampler="deis", rho=3.0, num_steps=1),
    )
    for name, picture in zip(names, expected, strict=True):
        with Image.open(tmp_path / "out" / name) as found:
            assert found.size == (16, 16)
            assert np.array_equal(np.asarray(found), np.asarray(picture))


def load(model: Path) -> ediffi.generator.Generator:
    """The library's own way in."""
    return ediffi.load(model)


def test_json_says_what_each_picture_is(ediffi: Run, model: Path, tmp_path: Path) -> None:
    """For programs: path, prompt, seed and size, and who had to be stood in for."""
    words = ["--prompt", "a dot", "--seed", "3", "--image-px", "8", "--model", "base", *FAST]
    _, out, _ = ediffi("sample", str(model), *words, "--out", str(tmp_path), "--json")
    path = str(tmp_path / "000-seed3.png")
    row = {"path": path, "prompt": "a dot", "seed": 3, "image_px": 8}
    assert json.loads(out) == {"pictures": [row], "stand_ins": []}
    expected = load(model).generate(
        "a dot",
        seeds=[3],
        image_px=8,
        model="base",
        config=SamplingConfig(sampler="dpm++2m", num_steps=2),
    )
    with Image.open(path) as found:
        assert np.array_equal(np.asarray(found), np.asarray(expected[0]))


def test_options_reach_every_field_of_the_config() -> None:
    """Each field has its option; left out, it is the library's default."""
    assert command._config(parsed()) == SamplingConfig()
    words = {
        "sampler": ("--sampler", "heun"),
        "num_steps": ("--steps", "3"),
        "guidance": ("--guidance", "4"),
        "guidance_interval": ("--guidance-interval", "0.5", "inf"),
        "guidance_rescale": ("--guidance-rescale", "0.5"),
        "dynamic_threshold": ("--dynamic-threshold", "0.9"),
        "churn": ("--churn", "10"),
        "churn_sigma_min": ("--churn-sigma-min", "0.1"),
        "churn_sigma_max": ("--churn-sigma-max", "9"),
        "churn_noise": ("--churn-noise", "1.01"),
        "sigma_min": ("--sigma-min", "0.01"),
        "sigma_max": ("--sigma-max", "40"),
        "rho": ("--rho", "5"),
        "batch_pictures": ("--batch-pictures", "2"),
    }
    assert set(words) == {field.name for field in fields(SamplingConfig)}
    config = command._config(parsed(*(word for option in words.values() for word in option)))
    for field, option in words.items():
        said = tuple(map(float, option[1:])) if field != "sampler" else (option[1],)
        assert getattr(config, field) == (said if len(said) > 1 else said[0])


def test_enlarging_is_said_for_all_models_or_for_one() -> None:
    """What is said of one counts for it; the rest is the paper's."""
    texts = ["num_steps=5", "sr16.num_steps=7", "guidance=3", "guidance_interval=[0, .inf]"]
    configs = command.enlarging_configs(texts, ["sr16", "sr32"])
    assert {name: one.num_steps for name, one in configs.items()} == {"sr16": 7, "sr32": 5}
    assert {one.guidance for one in configs.values()} == {3.0}
    assert command.enlarging_configs([], ["sr16"]) == {"sr16": PAPER_ENLARGING}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_steps", r"must read \[NAME\.\]FIELD=VALUE.*got 'num_steps'"),
        ("sr99.num_steps=3", r"super-resolution models \(sr16\), got 'sr99"),
        ("steps=3", "steps: Extra inputs"),
        ("num_steps=0", "num_steps: Input should be greater than 0"),
        ("churn=1", "churn must be 0 with sampler 'deis'"),
        ("num_steps=[", "--enlarging num_steps="),
    ],
)
def test_unfit_enlarging_is_refused(text: str, message: str) -> None:
    """The message names the option and what it should have been."""
    with pytest.raises(UserError, match=message):
        command.enlarging_configs([text], ["sr16"])


def test_a_painting_steers_the_picture(
    ediffi: Run, model: Path, painting: Path, tmp_path: Path
) -> None:
    """The command's painting is the library's, colour by colour."""
    words = ["--prompt", "a red circle", "--seed", "1", *FAST, "--out", str(tmp_path / "out")]
    steer = ["--paint", str(painting), "--phrase", "#ff0000=red circle", "--strength", "9"]
    assert ediffi("sample", str(model), *words, *steer)[0] == 0
    expected = load(model).generate(
        "a red circle",
        seeds=[1],
        config=SamplingConfig(sampler="dpm++2m", num_steps=2),
        enlarging=SamplingConfig(sampler="deis", rho=3.0, num_steps=1),
        painting=Painting.from_picture(painting, {"#ff0000": "red circle"}, {"#ff0000": 9.0}),
    )
    with Image.open(tmp_path / "out" / "000-seed1.png") as found:
        assert np.array_equal(np.asarray(found), np.asarray(expected[0]))


def test_strengths_are_for_all_phrases_or_for_one(painting: Path) -> None:
    """A number alone is for all; a colour's own counts; without either it is the default."""
    with Image.open(painting) as opened:
        canvas = opened.copy()
    canvas.paste((0, 0, 255), (6, 0, 8, 8))
    canvas.save(painting)
    words = ["--paint", str(painting), "--phrase", "#ff0000=one", "--phrase", "#0000ff=two"]

    def strengths(*more: str) -> dict[str, float]:
        found = command._painting(parsed(*words, *more))
        assert found is not None
        return {phrase.text: phrase.strength for phrase in found.phrases}

    assert strengths() == {"one": DEFAULT_STRENGTH, "two": DEFAULT_STRENGTH}
    assert strengths("--strength", "0.7") == {"one": 0.7, "two": 0.7}
    both = ("--strength", "#0000ff=0.9", "--strength", "0.7")
    assert strengths(*both) == {"one": 0.7, "two": 0.9}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--phrase", "#ff0000=a dot"], "--phrase and --strength need --paint"),
        (["--paint", "P"], "so that each of its colours needs a phrase"),
        (["--paint", "P", "--phrase", "a dot"], "--phrase must read '#rrggbb=...', got 'a dot'"),
        (["--paint", "P", *["--phrase", "#ff0000=a dot"] * 2], "#ff0000 stands twice"),
        (["--paint", "P", "--phrase", "#00ff00=a dot"], "#00ff00"),
        (
            ["--paint", "P", "--phrase", "#ff0000=a dot", "--strength", "#ff0000=much"],
            "--strength must be a number, got 'much'",
        ),
        (
            ["--paint", "P", "--phrase", "#ff0000=a dot", *["--strength", "1"] * 2],
            "--strength for all phrases must be given once",
        ),
        (["--style", "absent.png"], "has no image stream"),
        (["--image-px", "64"], "8, 16; got 64"),
        (["--drop-stream", "sound"], "cannot drop sound"),
        (["--churn", "3", "--sampler", "deis"], "churn must be 0"),
        (["--device-gib", "1e-9"], "device_gib must hold the weights of one expert"),
    ],
)
def test_what_cannot_be_is_the_users_error(
    ediffi: Run, model: Path, painting: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    """Exit code 2, one message, no traceback and no pictures."""
    words = [str(painting) if word == "P" else word for word in words]
    out = tmp_path / "out"
    code, _, err = ediffi("sample", str(model), "--prompt", "a dot", *words, "--out", str(out))
    assert code == 2
    assert message in err
    assert not out.exists()


def test_what_is_no_ensemble_is_refused(ediffi: Run, tmp_path: Path) -> None:
    """A wrong directory is the user's error, and named."""
    code, _, err = ediffi("sample", str(tmp_path), "--prompt", "a dot")
    assert code == 2
    assert str(tmp_path) in err


def test_the_base_stands_in_only_when_told_to(ediffi: Run, deaf: Path, tmp_path: Path) -> None:
    """An absent expert is an error with its file's name, or is said in the answer."""
    (deaf / "low.safetensors").rename(tmp_path / "low.safetensors")
    words = ["sample", str(deaf), "--prompt", "a dot", "--seed", "0", "--out", str(tmp_path)]
    code, _, err = ediffi(*words)
    assert code == 2
    assert "low.safetensors" in err
    with pytest.warns(UserWarning, match="low"):
        code, out, _ = ediffi(*words, "--missing-experts", "base", "--json", *FAST[:4])
    (tmp_path / "low.safetensors").rename(deaf / "low.safetensors")
    assert code == 0
    assert json.loads(out)["stand_ins"] == ["low"]


def test_sampling_needs_neither_ray_nor_mlflow(deaf: Path, tmp_path: Path) -> None:
    """The command works where both cannot be imported."""
    code = (
        "import sys; sys.modules['ray'] = sys.modules['mlflow'] = None; "
        "from pipelines.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    words = ["sample", str(deaf), "--prompt", "a dot", "--seed", "4", "--steps", "1"]
    done = subprocess.run(
        [sys.executable, "-c", code, *words, "--out", str(tmp_path)],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(tmp_path / "000-seed4.png")]
