"""The training state is one, whatever the ZeRO stage, the offload and the number of ranks."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ediffi.train.conftest import Tour
from tests.ediffi.train.ranks import END, SAVED, SETTINGS, Toy, go_on, training

# DeepSpeed 0.19 at stage 3 calls what torch 2.14 renames.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.distributed.*is deprecated:FutureWarning")

# Ranks and stages add float32 numbers up in different orders.
TOLERANCE = 2e-6


def assert_close(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Norms of the gradients, as many as `found` has, and the weights are equal up to rounding."""
    norms = expected["norms"][-len(found["norms"]) :]
    assert found["norms"] == pytest.approx(norms, rel=TOLERANCE)
    assert found["sums"] == pytest.approx(expected["sums"], rel=TOLERANCE, abs=1e-4)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_fragments_are_live_views_of_everything(tmp_path: Path, zero_stage: int) -> None:
    """One rank's fragments are all parameters in order; a step changes them in place."""
    with training(tmp_path, zero_stage=zero_stage) as run:
        fragments = run.state.fragments
        initial = dict(Toy().network.named_parameters())
        assert [f.name for f in fragments] == list(initial)
        assert all(torch.equal(f.weights, initial[f.name].flatten()) for f in fragments)
        tensors = run.state.tensors()
        assert not any(moment.any() for moment in tensors["exp_avg"] + tensors["exp_avg_sq"])

        run.step()

        whole = run.state.whole([fragment.weights for fragment in fragments])
        assert whole.keys() == initial.keys() | {"frequencies"}
        assert all(not torch.equal(whole[name], initial[name]) for name in initial)
        assert all(moment.any() for moment in tensors["exp_avg"] + tensors["exp_avg_sq"])
        assert run.state.num_steps == 1


def test_whole_keeps_every_bit(tmp_path: Path) -> None:
    """Negative zero and nan come out as they went in, in tensors of their own."""
    with training(tmp_path) as run:
        weights = run.state.tensors()["weights"]
        odd = [torch.full_like(tensor, -0.0) for tensor in weights]
        odd[0][0] = torch.nan

        whole = run.state.whole(odd)

        first = whole[run.state.fragments[0].name].flatten()
        assert first[0].isnan()
        assert first[1:].signbit().all()
        odd[0].fill_(3.0)
        assert not (first == 3.0).any()


def test_weights_alone_leave_the_moments(tmp_path: Path) -> None:
    """Loading without the optimizer takes the weights and keeps a fresh AdamW."""
    with training(tmp_path) as run:
        run.step()
        run.save()
        expected = run.state.whole(run.state.tensors()["weights"])
        checkpoint = run.store.load_newest()
        assert checkpoint is not None
    with training(tmp_path / "other", zero_stage=3) as other:
        other.state.load(checkpoint.read, optimizer=False, num_steps=1)

        whole = other.state.whole(other.state.tensors()["weights"])
        assert all(torch.equal(whole[name], expected[name]) for name in expected)
        assert not any(moment.any() for moment in other.state.tensors()["exp_avg"])
        assert other.state.num_steps == 0


@pytest.mark.parametrize("name", SETTINGS)
def test_one_rank_resumes_bit_by_bit(tmp_path: Path, one_rank: Tour, name: str) -> None:
    """At the same stage the run ends with the same bits as one that was not interrupted."""
    resumed = go_on(shutil.copytree(one_rank.path, tmp_path / "one"), name, name)

    assert resumed["norms"] == one_rank.begun[name]["norms"][SAVED:]
    assert resumed["sha256"] == one_rank.begun[name]["sha256"]


@pytest.mark.parametrize("name", SETTINGS)
def test_stages_and_offload_change_nothing(one_rank: Tour, name: str) -> None:
    """Every setting gives the gradients and weights of stage 0."""
    assert len(one_rank.begun[name]["norms"]) == END
    assert_close(one_rank.begun[name], one_rank.begun["0"])


@pytest.mark.parametrize("written_by", ["0", "2", "3", "3-offload"])
def test_another_stage_goes_on(tmp_path: Path, one_rank: Tour, written_by: str) -> None:
    """What one stage wrote any other reads."""
    copied = shutil.copytree(one_rank.path, tmp_path / "one")
    for name in ("0", "1", "2-offload", "3"):
        assert_close(go_on(copied, written_by, name), one_rank.begun["0"])


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_two_ranks_agree_with_one(one_rank: Tour, two_ranks: Tour, name: str) -> None:
    """Two ranks with the same batches give the gradients and weights of one."""
    assert_close(two_ranks.begun[name], one_rank.begun["0"])


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_two_ranks_resume_bit_by_bit(two_ranks: Tour, name: str) -> None:
    """At the same stage and number of ranks the run ends with the same bits."""
    begun, resumed = two_ranks.begun[name], two_ranks.found["resumed"][name]

    assert resumed["norms"] == begun["norms"][SAVED:]
    assert resumed["sha256"] == begun["sha256"]


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_from_one_rank_to_two(one_rank: Tour, two_ranks: Tour, name: str) -> None:
    """Two ranks go on from the checkpoint of one."""
    assert_close(two_ranks.found["crossed"][name], one_rank.begun["0"])


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_from_two_ranks_to_one(tmp_path: Path, one_rank: Tour, two_ranks: Tour, name: str) -> None:
    """One rank goes on from the checkpoint of two, at the same stage and at another."""
    copied = shutil.copytree(two_ranks.path, tmp_path / "two")

    assert_close(go_on(copied, name, name), one_rank.begun["0"])
    assert_close(go_on(copied, name, "0" if name != "0" else "3"), one_rank.begun["0"])
