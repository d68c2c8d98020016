"""Super-resolution through the one training loop: patches, resuming, and that it enlarges well."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from ediffi.conditioning import Conditioning
from ediffi.degradation import DegradationConfig, LowRes
from ediffi.efficient_unet import EfficientUNetConfig
from ediffi.noise import SigmaDistribution
from ediffi.samplers import heun, initial_noise
from ediffi.schedule import sigma_schedule
from ediffi.shards import ShardFile, ShardRef, ShardWriter
from ediffi.snapshot import load_snapshot
from ediffi.train.config import TrainConfig
from ediffi.train.data import low_res_of, to_unit_range
from ediffi.train.loop import TrainJob
from pipelines.demo.shapes import Split, combinations_of, draw
from tests.ediffi.train.toy import CONFIG, STREAMS, Killed, after, make_job, run, weights

PATCHES = EfficientUNetConfig(
    image_px=4,  # of pictures of 8 px
    low_res_factor=2,
    widths=(16,),
    num_blocks=(1,),
    cross_attention_px=(2,),
    head_width=8,
    context_width=16,
    embedding_width=16,
    streams=STREAMS,
)
PICTURE_PX = 16
NUM_HELD_OUT = 48


def patch_job(directory: Path) -> TrainJob:
    """Train on random quarters of the toy's pictures."""
    return make_job(directory, network=PATCHES, picture_px=8, low_res=LowRes(factor=2))


@pytest.mark.filterwarnings("ignore:.torch.distributed.*is deprecated:FutureWarning")
def test_training_on_patches_resumes_bit_by_bit(tmp_path: Path) -> None:
    """Killed and called again, the run ends with the rows and weights of an undisturbed one."""
    undisturbed, killed = patch_job(tmp_path / "a"), patch_job(tmp_path / "b")
    summary, rows = run(undisturbed)
    with pytest.raises(Killed):
        run(killed, after(4, Killed))
    resumed_summary, resumed_rows = run(killed)

    assert summary["num_parameters"] > 0
    assert 0 < resumed_summary["resumed_from_images"] < CONFIG.total_images
    assert resumed_rows == rows[-len(resumed_rows) :]
    expected = weights(undisturbed)
    assert all(torch.equal(found, expected[name]) for name, found in weights(killed).items())
    snapshot, denoiser = load_snapshot(killed.snapshot_path)
    assert snapshot.network == PATCHES
    larger = Conditioning(_dropped_streams(), 1, torch.zeros(1, 3, 4, 4))
    assert denoiser(torch.randn(1, 3, 8, 8), torch.ones(1), larger).shape == (1, 3, 8, 8)


def _dropped_streams() -> dict:
    """The toy's streams, dropped."""
    from ediffi.conditioning import collate

    return collate([{}], STREAMS).streams


# -- does it enlarge? -----------------------------------------------------------------------------


def mild() -> DegradationConfig:
    """Real-ESRGAN's degradation, less strong: these pictures are as large as a block of JPEG."""
    config = DegradationConfig()
    noise = {"poisson_scale": (0.05, 0.3), "jpeg_quality": (80.0, 95.0)}
    return replace(
        config,
        first=replace(config.first, **noise, blur_std_px=(0.2, 1.5), gaussian_std_8bit=(1.0, 5.0)),
        second=replace(
            config.second, **noise, blur_std_px=(0.2, 0.8), gaussian_std_8bit=(1.0, 3.0)
        ),
    )


LOW_RES = LowRes(factor=2, degradation=mild())


def shapes(split: Split, num: int) -> list[np.ndarray]:
    """Pictures of the demo: one coloured shape each; held-out combinations are never trained."""
    combinations = combinations_of(split)
    return [
        draw(
            combinations[index % len(combinations)],
            image_px=PICTURE_PX,
            rng=np.random.default_rng([7, index]),
        )
        for index in range(num)
    ]


def shape_shard(directory: Path, num: int) -> ShardRef:
    """A shard of the demo's training pictures, without embeddings."""
    directory.mkdir(parents=True)
    path = directory / "00000.tar"
    with ShardWriter(path) as writer:
        for index, picture_HWC in enumerate(shapes("train", num)):
            png = io.BytesIO()
            Image.fromarray(picture_HWC).save(png, "png")
            writer.write(f"{index:05d}", {"png": png.getvalue(), "txt": b"a shape"})
    return ShardRef(name="00000", images=ShardFile(path), embeddings={}, num_samples=num)


def psnr_db(found_BCHW: Tensor, true_BCHW: Tensor) -> float:
    """Mean peak signal-to-noise ratio of pictures in [-1, 1]."""
    error_B = (found_BCHW.clamp(-1, 1) - true_BCHW).square().mean(dim=(1, 2, 3))
    return (10 * torch.log10(4 / error_B)).mean().item()


@pytest.mark.slow
@pytest.mark.timeout(1200)  # a minute on an idle core, many on a crowded one
def test_a_short_training_enlarges_better_than_interpolation(tmp_path: Path) -> None:
    """Unseen shapes, degraded to 8 px and drawn at 16 px, beat bicubic enlarging by over 1 dB."""
    job = make_job(
        tmp_path,
        shards=(shape_shard(tmp_path / "shapes", 1200),),
        network=EfficientUNetConfig(
            image_px=PICTURE_PX,
            low_res_factor=2,
            widths=(32, 64),
            num_blocks=(1, 2),
            embedding_width=64,
        ),
        low_res=LOW_RES,
        # The demo's: a short training must see the high noise that sampling begins with.
        distribution=SigmaDistribution(log_mean=-0.3, log_std=1.3),
        config=TrainConfig(
            total_images=16_000,
            batch_images=32,
            lr=2e-3,
            lr_schedule="linear",
            warmup_images=1000,
            ema_half_life_images=1000,
            checkpoint_images=16_000,
            log_images=2000,
            flip=True,
        ),
    )
    run(job)
    _, denoiser = load_snapshot(job.snapshot_path)
    pictures = [torch.from_numpy(one).permute(2, 0, 1) for one in shapes("held_out", NUM_HELD_OUT)]
    true_BCHW = to_unit_range(torch.stack(pictures))
    low_BCHW = torch.stack([low_res_of(one, LOW_RES, i) for i, one in enumerate(pictures)])
    drawn_BCHW = heun(
        denoiser,
        initial_noise(range(NUM_HELD_OUT), (3, PICTURE_PX, PICTURE_PX), 40.0),
        sigma_schedule(12, sigma_min=0.002, sigma_max=40.0, rho=7.0),
        Conditioning({}, NUM_HELD_OUT, low_BCHW),
    )
    bicubic_BCHW = functional.interpolate(low_BCHW, size=(PICTURE_PX, PICTURE_PX), mode="bicubic")
    ours_db, bicubic_db = psnr_db(drawn_BCHW, true_BCHW), psnr_db(bicubic_BCHW, true_BCHW)
    print(f"PSNR: ours {ours_db:.2f} dB, bicubic {bicubic_db:.2f} dB")
    assert ours_db > bicubic_db + 1
