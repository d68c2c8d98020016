"""The GPU benchmark needs torch alone, and measures the paper's network."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from benchmarks import gpu_train
from benchmarks.report import load_rows
from pipelines import recipes

# Refuses what a bare GPU machine lacks: the project's dependencies but torch, numpy, safetensors.
_BARE_MACHINE = """
import sys

for name in (
    "PIL", "accelerate", "boto3", "deepspeed", "diffusers", "img2dataset", "matplotlib", "mlflow",
    "open_clip", "pandas", "psutil", "pyarrow", "pydantic", "ray", "rich", "s3fs", "scipy",
    "sentencepiece", "timm", "torchvision", "transformers", "upath", "webdataset", "yaml",
):
    sys.modules[name] = None  # it cannot be imported, and is not found when looked for
import torch
torch.set_num_threads(1)
from benchmarks.gpu_train import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_runs_with_torch_alone(tmp_path: Path) -> None:
    """Where only torch can be imported the toy network trains, and its rows can be read."""
    path = tmp_path / "rows.json"
    command = [sys.executable, "-c", _BARE_MACHINE, "--tiny", "--json", str(path)]
    command += ["--variants", "eager", "checkpointing"]
    command += ["--batch-images", "2", "--runs", "2", "--steps", "1"]

    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    assert result.returncode == 0, result.stderr
    rows = load_rows(path)
    assert [row.unit for row in rows] == ["images/s", "TFLOP/s"] * 2
    assert rows[2].other_name == "eager"
    assert "MFU" in rows[3].other_name
    assert json.loads(result.stdout) == json.loads(path.read_text())


def test_the_network_is_that_of_the_papers_recipe() -> None:
    """The sizes written out in the benchmark are those of the recipe that a user would run."""
    path = Path(recipes.__path__[0]) / "ediffi-64px.yaml"
    recipe = yaml.safe_load(path.read_text())

    for name, value in recipe["network"].items():
        found = getattr(gpu_train.PAPER, name)
        assert (list(found) if isinstance(found, tuple) else found) == value, name
    assert recipe["data"]["image_px"] == gpu_train.PAPER.image_px
    assert list(recipe["encoders"]) == [stream.name for stream in gpu_train.PAPER.streams]
    for name, num_tokens in gpu_train.NUM_TOKENS.items():
        assert recipe["encoders"][name]["max_tokens"] == num_tokens
    batch_of_gpu = recipe["base"]["batch_images"] / recipe["resources"]["base"]["num_workers"]
    assert recipe["base"]["micro_batch_images"] <= batch_of_gpu


def test_batch_is_halved_until_it_fits(monkeypatch) -> None:
    """A batch that runs out of memory is tried again at half its size; one image must fit."""
    tried: list[int] = []

    def measured(config, variant, device, batch_images, runs, num_steps):
        tried.append(batch_images)
        if batch_images > limit:
            raise torch.OutOfMemoryError("full")
        return batch_images

    monkeypatch.setattr(gpu_train, "_measure", measured)
    device, variant = torch.device("cpu"), gpu_train.VARIANTS[0]

    limit = 20
    found = gpu_train.measure(gpu_train.TINY, variant, device, 64, runs=1, num_steps=1)
    assert (found, tried) == (16, [64, 32, 16])

    limit = 0
    with pytest.raises(ValueError, match="one image must fit"):
        gpu_train.measure(gpu_train.TINY, variant, device, 2, runs=1, num_steps=1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_whole_network_is_refused(capsys) -> None:
    """On a CPU the paper's network would take hours: the words say what to do instead."""
    assert gpu_train.main([]) == 2
    assert "--tiny" in capsys.readouterr().err
