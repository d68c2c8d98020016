"""Tests of stages that are finished without some of their units: who is served by them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import pytest

from pipelines.caches.repair import prepare_retry
from pipelines.driver.stand_ins import stand_ins_of
from pipelines.errors import StageFailed, UserError
from pipelines.planning import plan
from pipelines.recipe import Recipe, Resources
from pipelines.recipe_file import load_recipe
from pipelines.stage_graph import build_stages
from pipelines.store.ledger import Ledger
from tests.pipelines.driver.test_runner import Told, drive
from tests.pipelines.fake_stages import FakeStage

UNITS = ("low", "middle", "high")
ONCE = {"experts": Resources(cpus=0.5, attempts=1)}


@dataclass(frozen=True, kw_only=True)
class FakeExperts(FakeStage):
    """Experts that are not trained but written."""

    min_success: int | Literal["all"] = "all"
    stand_in: ClassVar[str] = "base"


def experts(
    min_success: int | Literal["all"], *failing: str, units: tuple[str, ...] = UNITS
) -> FakeExperts:
    behaviour = dict.fromkeys(failing, "fails")
    return FakeExperts(name="experts", units=units, behaviour=behaviour, min_success=min_success)


AFTER = FakeStage(name="after", needs=("experts",))


def test_no_fingerprint_knows_of_it(demo_recipe: Recipe) -> None:
    """How many are enough changes nothing in those that are trained."""
    identities = [
        {one.name: one.identity() for one in build_stages(load_recipe("demo", overrides))}
        for overrides in ((), ("experts.min_success=2",))
    ]
    for name in ("base", "experts", "assemble"):
        assert identities[0][name] == identities[1][name]
    with pytest.raises(
        UserError, match="must be at most the number of experts, 3, or 'all', got 4"
    ):
        load_recipe("demo", ["experts.min_success=4"])


@pytest.mark.usefixtures("ray_cluster")
class TestRun:
    """Of real runs."""

    def test_the_base_may_stand_in(self, demo_recipe: Recipe, ledger: Ledger) -> None:
        """Enough are trained: the stage is finished and says aloud who is not, and why."""
        told = drive(demo_recipe, ledger, ONCE, experts(2, "low"), AFTER)
        assert told.error is None
        assert told.ends == {"experts": "ran", "after": "ran"}
        manifest = told.states["experts"].planned.record.manifest()
        assert stand_ins_of(manifest) == ["low"]
        receipt = manifest.receipt("low")
        assert (receipt.files, receipt.facts) == ((), {"stand_in": "base"})
        assert receipt.reason == "RuntimeError: low is broken"
        (line,) = (line for line in told.said if "ATTENTION" in line)
        assert "1 of 3 units failed, base stands in for them" in line
        assert "low: RuntimeError: low is broken" in line
        assert set(drive(demo_recipe, ledger, ONCE, experts(2), AFTER).ends.values()) == {"cached"}

    def test_too_few_are_a_failure(self, demo_recipe: Recipe, ledger: Ledger) -> None:
        """With one of three, or none at all, nothing stands in for anybody."""
        told = drive(demo_recipe, ledger, ONCE, experts(2, "low", "high"), AFTER)
        assert type(told.error) is StageFailed
        assert told.ends == {"experts": "failed", "after": "blocked"}
        assert told.states["experts"].planned.record.done_units() == {"middle"}

    def test_a_recipe_that_wants_all_is_not_served(
        self, demo_recipe: Recipe, ledger: Ledger, use_stages: Callable[..., None]
    ) -> None:
        """It sees why, trains what is lacking, and what was made from the stand-in is redone."""
        before = drive(demo_recipe, ledger, ONCE, experts(2, "low"), AFTER)
        use_stages(experts("all"), AFTER)
        first, second = plan(demo_recipe, ledger)
        assert first.reasons == (
            "2 of 3 units are done, 3 are asked for: low failed and something else stands in",
        )
        assert not second.is_hit
        told = drive(demo_recipe, ledger, ONCE, experts("all"), AFTER)
        assert told.ends == {"experts": "ran", "after": "ran"}
        assert {name: len(pids) for name, pids in told.attempts.items()} == {
            **{"experts/low": 2, "experts/middle": 1, "experts/high": 1, "after/a": 1}
        }
        assert told.attempts["after/a"] != before.attempts["after/a"]  # what it had kept is gone
        manifest = told.states["experts"].planned.record.manifest()
        assert stand_ins_of(manifest) == []
        alone = self._undisturbed(demo_recipe, ledger)
        assert alone == (manifest.directory / "manifest.json").read_bytes()
        assert before.states["experts"].planned.fingerprint == manifest.fingerprint

    def _undisturbed(self, recipe: Recipe, ledger: Ledger) -> bytes:
        other = Ledger.open(Path(str(ledger.store) + "-2"))
        told: Told = drive(recipe, other, ONCE, experts("all"), AFTER)
        return bytes(
            (told.states["experts"].planned.record.directory / "manifest.json").read_bytes()
        )

    def test_one_that_had_a_stand_in_may_fail_again(
        self, demo_recipe: Recipe, ledger: Ledger
    ) -> None:
        """The recipe that wants all fails, and leaves nothing that the other could not use."""
        drive(demo_recipe, ledger, ONCE, experts(2, "low"))
        told = drive(demo_recipe, ledger, ONCE, experts("all", "low"))
        assert told.ends == {"experts": "failed"}
        again = drive(demo_recipe, ledger, ONCE, experts(2, "low"))
        assert again.ends == {"experts": "ran"}
        assert [len(again.attempts[f"experts/{unit}"]) for unit in UNITS] == [3, 1, 1]

    def test_a_retry_finds_them(
        self, demo_recipe: Recipe, ledger: Ledger, use_stages: Callable[..., None]
    ) -> None:
        """`ediffi cache retry --only-failed` asks for those again that something stands in for."""
        drive(demo_recipe, ledger, ONCE, experts(2, "low"))
        use_stages(experts(2))
        (retry,) = prepare_retry(ledger, "experts", demo_recipe, only_failed=True)
        assert list(retry.rejected) == ["low"]
