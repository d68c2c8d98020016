"""Tests of ediffi.ensemble: routing by sigma, and the average that it is measured against."""

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from ediffi.conditioning import Conditioning, Stream
from ediffi.ensemble import ROUTE, Blend, Ensemble
from ediffi.guidance import guided
from ediffi.noise import WHOLE, NoiseInterval
from ediffi.preconditioning import DenoiserFn
from ediffi.samplers import SAMPLERS
from ediffi.sampling import SamplingConfig, draw
from ediffi.schedule import sigma_schedule
from tests.tiny_ensemble import INTERVALS, PAPER, random_denoiser, text


class Constant(nn.Module):
    """A stand-in for an expert that answers its own number plus each sample's conditioning."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, x_BCHW: Tensor, sigma_B: Tensor, conditioning: Conditioning) -> Tensor:
        assert len(x_BCHW) == len(sigma_B) == conditioning.batch_size
        pooled_BD = conditioning.streams["label"].pooled_BD
        assert pooled_BD is not None
        return torch.zeros_like(x_BCHW) + self.value + pooled_BD[:, :, None, None]


def constants(blend: Blend = ROUTE) -> Ensemble:
    """Experts that answer 100, 200 and 300 from low to high noise."""
    values = {"high": 300.0, "low": 100.0, "middle": 200.0}
    experts = {name: (INTERVALS[name], Constant(value)) for name, value in values.items()}
    return Ensemble(experts, blend=blend)


def answers(ensemble: Ensemble, sigmas: list[float]) -> list[float]:
    """What the ensemble answers for samples labelled 0, 1, 2, ... at these noise levels."""
    labels = torch.arange(float(len(sigmas)))[:, None]
    conditioning = Conditioning({"label": Stream(pooled_BD=labels)}, len(sigmas))
    sigma_B = torch.tensor(sigmas, dtype=torch.float64)
    found = ensemble(torch.zeros(len(sigmas), 1, 1, 1), sigma_B, conditioning)
    return found.flatten().tolist()


def test_each_sample_goes_to_the_expert_of_its_sigma_with_its_own_conditioning():
    """A mixed batch is split and put together again in order."""
    found = answers(constants(), [80.0, 0.01, 1.0, 9.0, 0.07, 10.0])
    assert found == [300.0, 101.0, 202.0, 203.0, 104.0, 305.0]


def test_intervals_are_half_open_at_the_edges():
    """An edge belongs to the expert above it, the value just below to the one below."""
    low_edge, high_edge = INTERVALS["low"].sigma_max, INTERVALS["high"].sigma_min
    for edge, below, above in ((low_edge, 100.0, 200.0), (high_edge, 200.0, 300.0)):
        assert answers(constants(), [edge]) == [above]
        assert answers(constants(), [math.nextafter(edge, 0.0)]) == [below]
        assert answers(constants(), [edge, math.nextafter(edge, 0.0)]) == [above, below + 1]


def test_float32_sigma_inside_an_interval_is_routed_to_its_expert():
    """Training noise levels of an expert, rounded to float32, never reach another one."""
    u_B = torch.cat([torch.tensor([0.0, 1.0]), torch.rand(200)]).double()
    for name, value in (("low", 100.0), ("middle", 200.0), ("high", 300.0)):
        sigmas = PAPER.sigma_at(u_B, INTERVALS[name]).tolist()
        assert answers(constants(), sigmas) == [value + label for label in range(len(sigmas))]


def test_calls_count_network_calls_per_expert():
    """A uniform batch is one call; a mixed one is a call for each expert concerned."""
    ensemble = constants()
    assert ensemble.names == ("low", "middle", "high")
    answers(ensemble, [1.0, 2.0, 3.0])
    answers(ensemble, [1.0, 20.0, 30.0])
    assert dict(ensemble.calls) == {"middle": 2, "high": 1}
    ensemble.reset_calls()
    assert not ensemble.calls


def test_heun_routes_each_call_of_a_step_by_its_own_sigma():
    """25 Heun steps divide their 49 calls 17/22/10 between high, middle and low noise."""
    ensemble = constants()
    conditioning = Conditioning({"label": Stream(pooled_BD=torch.zeros(1, 1))}, 1)
    SAMPLERS["heun"](ensemble, torch.zeros(1, 1, 1, 1), sigma_schedule(25), conditioning)
    assert dict(ensemble.calls) == {"high": 17, "middle": 22, "low": 10}


def test_guidance_costs_an_ensemble_one_call():
    """The conditional and the null branch share sigma, hence expert and call."""
    ensemble = constants()
    conditioning = Conditioning({"label": Stream(pooled_BD=torch.ones(2, 1))}, 2)
    found = guided(ensemble, 3.0)(torch.zeros(2, 1, 1, 1), torch.ones(2), conditioning)
    assert found.flatten().tolist() == [203.0, 203.0]
    assert dict(ensemble.calls) == {"middle": 1}


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.nan])
def test_noise_levels_that_no_expert_owns_are_refused(sigma):
    """Zero, negative and NaN noise levels are errors and not the nearest expert's."""
    with pytest.raises(ValueError, match="positive"):
        answers(constants(), [1.0, sigma])


def test_experts_must_tile_the_axis():
    """An ensemble with a gap cannot be built."""
    with pytest.raises(ValueError, match="gap"):
        Ensemble(
            {"a": (NoiseInterval(0.0, 1.0), Constant(1)), "b": (NoiseInterval(2.0), Constant(2))}
        )


def test_any_name_is_allowed_in_memory():
    """Names that are attributes of torch containers do not clash."""
    ensemble = Ensemble({"pop": (WHOLE, Constant(7.0))})
    assert answers(ensemble, [1.0, 50.0]) == [7.0, 8.0]


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_experts_with_equal_weights_equal_the_base_bit_for_bit(sampler, guidance):
    """Drawing through three copies of the base, each its own, gives the base's own pictures."""
    base, conditioning = random_denoiser(0), text(3)
    ensemble = Ensemble({name: (own, random_denoiser(0)) for name, own in INTERVALS.items()})
    config = SamplingConfig(sampler=sampler, num_steps=8, guidance=guidance)

    def drawn(denoiser: DenoiserFn) -> Tensor:
        return draw(denoiser, conditioning, seeds=[0, 1, 2], shape_CHW=(3, 8, 8), config=config)

    expected = drawn(base)
    assert torch.equal(drawn(ensemble), expected)
    assert set(ensemble.calls) == {"low", "middle", "high"}
    other = Ensemble({**_copies(), "high": (INTERVALS["high"], random_denoiser(1))})
    assert not torch.equal(drawn(other), expected)


def _copies() -> dict:
    return {name: (interval, random_denoiser(0)) for name, interval in INTERVALS.items()}


def test_a_mixed_batch_equals_its_samples_one_by_one():
    """Splitting a batch leaves every sample as if it had been sent to its expert alone."""
    denoisers = {name: random_denoiser(seed) for seed, name in enumerate(INTERVALS)}
    ensemble = Ensemble({name: (INTERVALS[name], d) for name, d in denoisers.items()})
    x_BCHW, conditioning = torch.randn(4, 3, 8, 8), text(4)
    sigma_B, names = torch.tensor([0.5, 20.0, 0.01, 5.0]), ["middle", "high", "low", "middle"]
    with torch.no_grad():
        found = ensemble(x_BCHW, sigma_B, conditioning)
        for b, name in enumerate(names):
            one = slice(b, b + 1)
            expected = denoisers[name](
                x_BCHW[one], sigma_B[one], conditioning.select(torch.tensor([b]))
            )
            torch.testing.assert_close(found[one], expected, rtol=1e-5, atol=1e-5)
    assert dict(ensemble.calls) == {"low": 1, "middle": 1, "high": 1}


def test_gradients_reach_every_expert_of_a_mixed_batch():
    """The split is differentiable."""
    experts = {name: (INTERVALS[name], random_denoiser(0)) for name in INTERVALS}
    ensemble = Ensemble(experts)
    ensemble(torch.randn(3, 3, 8, 8), torch.tensor([0.01, 1.0, 20.0]), text(3)).sum().backward()
    for _, denoiser in experts.values():
        assert any((p.grad is not None and p.grad.any()) for p in denoiser.parameters())


# -- the average ----------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.4, 0.9, 1.0])
def test_an_average_gives_alpha_to_the_owner_and_equal_shares_to_the_others(alpha):
    """Each sample of a mixed batch gets its own weights; three constants show them."""
    sigmas, values = [80.0, 0.01, 1.0], [100.0, 200.0, 300.0]
    owners = [2, 0, 1]
    found = answers(constants(Blend(kind="average", alpha=alpha)), sigmas)
    for label, (answer, owner) in enumerate(zip(found, owners)):
        shares = [alpha if index == owner else (1 - alpha) / 2 for index in range(3)]
        expected = label + sum(share * value for share, value in zip(shares, values))
        assert answer == pytest.approx(expected, rel=1e-6)


def test_an_average_with_all_the_weight_on_the_owner_is_routing():
    """At alpha 1 both kinds agree, though one asks everybody."""
    denoisers = {name: random_denoiser(seed) for seed, name in enumerate(INTERVALS)}
    experts = {name: (INTERVALS[name], denoisers[name]) for name in INTERVALS}
    inputs = torch.randn(3, 3, 8, 8), torch.tensor([0.01, 1.0, 20.0]), text(3)
    with torch.no_grad():
        averaged = Ensemble(experts, blend=Blend(kind="average", alpha=1.0))(*inputs)
        torch.testing.assert_close(averaged, Ensemble(experts)(*inputs), rtol=1e-5, atol=1e-5)


def test_an_average_of_equal_experts_is_the_expert():
    """Shares sum to one, whatever alpha is."""
    base, inputs = random_denoiser(0), (torch.randn(2, 3, 8, 8), torch.tensor([0.1, 30.0]), text(2))
    experts = {name: (interval, base) for name, interval in INTERVALS.items()}
    with torch.no_grad():
        found = Ensemble(experts, blend=Blend(kind="average", alpha=0.7))(*inputs)
        torch.testing.assert_close(found, base(*inputs), rtol=1e-5, atol=1e-6)


def test_an_average_asks_every_expert_each_time():
    """Its cost is counted as what it is."""
    ensemble = constants(Blend(kind="average"))
    answers(ensemble, [1.0, 20.0])
    assert dict(ensemble.calls) == {"low": 1, "middle": 1, "high": 1}


def test_an_only_expert_has_all_the_weight():
    """There is nobody to share with."""
    ensemble = Ensemble({"all": (WHOLE, Constant(7.0))}, blend=Blend(kind="average", alpha=0.5))
    assert answers(ensemble, [1.0, 50.0]) == [7.0, 8.0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"kind": "mean"}, "kind must be one of route, average"), ({"alpha": 1.1}, r"\[0, 1\]")],
)
def test_a_blend_that_makes_no_sense_is_refused(fields, message):
    """The message lists the choices."""
    with pytest.raises(ValueError, match=message):
        Blend(**fields)


# -- stand-ins, and denoisers that are no modules -------------------------------------------------


def test_stand_ins_are_named_in_order_and_must_be_experts():
    """They are told from the least to the most noisy; a name of nobody is refused."""
    experts = {name: (interval, Constant(1.0)) for name, interval in INTERVALS.items()}
    assert Ensemble(experts).stand_ins == ()
    assert Ensemble(experts, stand_ins=["high", "low"]).stand_ins == ("low", "high")
    with pytest.raises(ValueError, match="nobody"):
        Ensemble(experts, stand_ins=["nobody"])


def test_an_expert_may_be_any_denoiser():
    """Functions are routed to like modules; only modules lend the ensemble their weights."""
    own = random_denoiser(0)
    ensemble = Ensemble(
        {
            "low": (NoiseInterval(0.0, 1.0), lambda x, sigma, conditioning: x + 1),
            "high": (NoiseInterval(1.0, math.inf), own),
        }
    )
    x_BCHW = torch.randn(2, 3, 8, 8)
    found = ensemble(x_BCHW, torch.tensor([0.5, 2.0]), text(2))
    assert torch.equal(found[0], x_BCHW[0] + 1)
    pairs = itertools.zip_longest(ensemble.parameters(), own.parameters())
    assert all(one is other for one, other in pairs)
