"""Tests of ediffi.sampling: what draw composes, seeds against batches, what the config refuses."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ediffi.conditioning import Conditioning, Stream
from ediffi.guidance import guided
from ediffi.noise import NoiseInterval
from ediffi.samplers import SAMPLERS, Churn, SamplerStep, churn_noise, heun, initial_noise
from ediffi.sampling import SamplingConfig, draw, to_uint8
from ediffi.schedule import sigma_schedule
from ediffi.thresholding import dynamically_thresholded

SHAPE = (3, 4, 4)
SEEDS = (5, 0, 17, 3, 9)
CONFIGS = {
    "heun": SamplingConfig(num_steps=6),
    "churn": SamplingConfig(num_steps=6, churn=3.0, churn_sigma_min=0.05, churn_noise=1.003),
    "dpm++2m": SamplingConfig(num_steps=6, sampler="dpm++2m"),
    "deis": SamplingConfig(num_steps=6, sampler="deis", rho=6.0),
    "everything": SamplingConfig(
        num_steps=6,
        churn=3.0,
        churn_sigma_min=0.05,
        churn_sigma_max=50.0,
        churn_noise=1.05,
        guidance=5.0,
        guidance_interval=(0.01, 20.0),
        guidance_rescale=0.7,
        dynamic_threshold=0.9,
    ),
}


def conditioning_of(num_pictures: int) -> Conditioning:
    """A pooled vector a picture, each another."""
    pooled_BD = 0.1 * torch.arange(1.0, 1 + 3 * num_pictures).view(num_pictures, 3)
    return Conditioning({"clip_text": Stream(pooled_BD=pooled_BD)}, num_pictures)


class ColouredDenoiser:
    """The exact denoiser of N(m, 0.5^2), m being the pooled vector as a colour."""

    def __init__(self) -> None:
        self.batch_sizes: list[int] = []

    def __call__(self, x_BCHW: Tensor, sigma_B: Tensor, conditioning: Conditioning) -> Tensor:
        self.batch_sizes.append(len(x_BCHW))
        pooled_BD = conditioning.streams["clip_text"].pooled_BD
        assert pooled_BD is not None
        share_B111 = (0.25 / (0.25 + sigma_B**2))[:, None, None, None]
        mean_BC11 = pooled_BD[:, :, None, None]
        return mean_BC11 + share_B111 * (x_BCHW - mean_BC11)


def drawn(config: SamplingConfig, seeds: tuple[int, ...] = SEEDS, **more: object) -> Tensor:
    """Draw with the conditioning that goes with SEEDS."""
    rows = torch.tensor([SEEDS.index(seed) for seed in seeds])
    conditioning = conditioning_of(len(SEEDS)).select(rows)
    return draw(
        ColouredDenoiser(), conditioning, seeds=seeds, shape_CHW=SHAPE, config=config, **more
    )


@pytest.mark.parametrize("name", ["heun", "dpm++2m"])
def test_plain_drawing_is_noise_schedule_guidance_and_sampler(name):
    """With the defaults draw adds nothing to the parts, bit for bit."""
    expected = SAMPLERS[name](
        guided(ColouredDenoiser(), 2.0),
        initial_noise(SEEDS, SHAPE, 80.0),
        sigma_schedule(6),
        conditioning_of(len(SEEDS)),
    )
    found = drawn(CONFIGS[name])
    assert torch.equal(found, expected)
    assert (found.dtype, found.shape) == (torch.float32, (len(SEEDS), *SHAPE))


def test_everything_at_once_is_composed_in_order():
    """Guidance with its interval and rescale, then the threshold, in a churned Heun."""
    config = CONFIGS["everything"]
    denoiser = dynamically_thresholded(
        guided(ColouredDenoiser(), 5.0, interval=NoiseInterval(0.01, 20.0), rescale=0.7), 0.9
    )
    churn = Churn(
        amount=3.0,
        noise=lambda step: churn_noise(SEEDS, SHAPE, step, stage=2),
        sigma_min=0.05,
        sigma_max=50.0,
        noise_scale=1.05,
    )
    expected = heun(
        denoiser,
        initial_noise(SEEDS, SHAPE, 80.0, stage=2),
        sigma_schedule(6),
        conditioning_of(len(SEEDS)),
        churn=churn,
    )
    assert torch.equal(drawn(config, stage=2), expected)
    assert expected.abs().max() <= 1  # the last step is the thresholded estimate


@pytest.mark.parametrize("name", CONFIGS)
def test_a_picture_does_not_depend_on_its_batch(name):
    """Alone, in another order, or in batches of two: the same bits."""
    together = drawn(CONFIGS[name])
    assert torch.equal(drawn(replace(CONFIGS[name], batch_pictures=2)), together)
    assert torch.equal(drawn(CONFIGS[name], SEEDS[::-1]), together.flip(0))
    for index, seed in enumerate(SEEDS):
        assert torch.equal(drawn(CONFIGS[name], (seed,))[0], together[index])


@pytest.mark.parametrize("name", CONFIGS)
def test_guidance_of_one_is_the_conditional_model(name):
    """Bit for bit, from calls of B alone, whatever the interval and the rescale."""
    config = replace(CONFIGS[name], guidance=1.0, dynamic_threshold=0.0)
    denoiser, conditioning = ColouredDenoiser(), conditioning_of(len(SEEDS))
    found = draw(denoiser, conditioning, seeds=SEEDS, shape_CHW=SHAPE, config=config)
    assert set(denoiser.batch_sizes) == {len(SEEDS)}
    nowhere = replace(config, guidance=3.0, guidance_interval=(200.0, math.inf))
    assert torch.equal(drawn(nowhere), found)
    if not config.churn:
        noise = initial_noise(SEEDS, SHAPE, 80.0)
        sampler = SAMPLERS[config.sampler]
        assert torch.equal(sampler(ColouredDenoiser(), noise, config.sigmas(), conditioning), found)


@pytest.mark.parametrize(("name", "num_calls"), [("heun", 11), ("dpm++2m", 6), ("deis", 19)])
def test_network_calls_are_as_the_config_says(name, num_calls):
    """2N - 1, N and 3N + 1, of twice the batch under guidance."""
    denoiser = ColouredDenoiser()
    conditioning = conditioning_of(len(SEEDS))
    draw(denoiser, conditioning, seeds=SEEDS, shape_CHW=SHAPE, config=CONFIGS[name])
    assert denoiser.batch_sizes == [2 * len(SEEDS)] * num_calls


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_samplers_agree_where_steps_are_many(sampler):
    """All end at D(x, sigma_min), near the ODE's exact solution: no noise is left."""
    config = SamplingConfig(sampler=sampler, num_steps=300, guidance=1.0, sigma_min=0.05)
    mean = conditioning_of(len(SEEDS)).streams["clip_text"].pooled_BD[:, :, None, None]
    noise = initial_noise(SEEDS, SHAPE, 80.0)
    at_end = mean + (noise - mean) * math.sqrt((0.25 + 0.05**2) / (0.25 + 80.0**2))
    expected = mean + 0.25 / (0.25 + 0.05**2) * (at_end - mean)
    torch.testing.assert_close(drawn(config), expected, atol=5e-4, rtol=0)


def test_the_paper_s_settings_draw():
    """Kutta's method with 25 steps at rho 6 and 10 at rho 3, within the error of their grids."""
    mean = conditioning_of(len(SEEDS)).streams["clip_text"].pooled_BD[:, :, None, None]
    exact = mean + (initial_noise(SEEDS, SHAPE, 80.0) - mean) * 0.5 / math.sqrt(0.25 + 80.0**2)
    for num_steps, rho in ((25, 6.0), (10, 3.0)):
        config = SamplingConfig(sampler="deis", num_steps=num_steps, rho=rho, guidance=1.0)
        assert (drawn(config) - exact).abs().max() < 0.02


def test_another_stage_starts_from_other_noise():
    """The same seed in another network of a cascade is another picture; stage 0 is the base."""
    base = drawn(CONFIGS["heun"])
    assert torch.equal(drawn(CONFIGS["heun"], stage=0), base)
    assert not torch.allclose(drawn(CONFIGS["heun"], stage=1), base, atol=0.05)


def test_callback_is_told_of_every_batch():
    """Two batches of six steps each."""
    steps: list[SamplerStep] = []
    drawn(replace(CONFIGS["heun"], batch_pictures=3), callback=steps.append)
    assert [(step.index, len(step.x_BCHW)) for step in steps] == [
        *((index, 3) for index in range(6)),
        *((index, 2) for index in range(6)),
    ]


def test_seeds_and_conditioning_must_match():
    """One entry a seed, and no negative seed."""
    with pytest.raises(ValueError, match=r"one entry a seed \(2\), got 3"):
        draw(
            ColouredDenoiser(),
            conditioning_of(3),
            seeds=[0, 1],
            shape_CHW=SHAPE,
            config=CONFIGS["heun"],
        )
    with pytest.raises(ValueError, match="negative"):
        draw(
            ColouredDenoiser(),
            conditioning_of(1),
            seeds=[-1],
            shape_CHW=SHAPE,
            config=CONFIGS["heun"],
        )


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"sampler": "euler"}, "sampler"),
        ({"num_steps": 0}, "num_steps"),
        ({"num_steps": 0, "sampler": "deis"}, "num_steps"),
        ({"guidance": -1.0}, "guidance"),
        ({"guidance": math.nan}, "guidance"),
        ({"guidance_interval": (5.0, 0.3)}, "guidance_interval"),
        ({"guidance_interval": (-1.0, 0.3)}, "guidance_interval"),
        ({"guidance_interval": (1.0,)}, "guidance_interval"),
        ({"guidance_rescale": 1.5}, "guidance_rescale"),
        ({"dynamic_threshold": 99.5}, "dynamic_threshold"),
        ({"churn": -1.0}, "churn"),
        ({"churn": math.inf}, "churn"),
        ({"churn": 1.0, "sampler": "dpm++2m"}, "use heun"),
        ({"churn": 1.0, "sampler": "deis"}, "use heun"),
        ({"churn_sigma_min": 2.0, "churn_sigma_max": 1.0}, "churn_sigma_max"),
        ({"churn_noise": 0.0}, "churn_noise"),
        ({"sigma_min": 90.0}, "sigma_min"),
        ({"rho": 0.0}, "rho"),
        ({"batch_pictures": 0}, "batch_pictures"),
    ],
)
def test_config_names_the_field_it_refuses(fields, named):
    """Before anything is loaded or drawn."""
    with pytest.raises(ValueError, match=named):
        SamplingConfig(**fields)


def test_pictures_become_bytes_with_rounding_and_clipping():
    """-1 is 0, 0 is 128, 1 is 255, and what lies beyond is clipped."""
    values = torch.tensor([-1.5, -1.0, 0.0, 1.0, 7.0, 2 * 100.4 / 255 - 1])
    found = to_uint8(values)
    assert found.dtype == torch.uint8
    assert found.tolist() == [0, 0, 128, 255, 255, 100]
