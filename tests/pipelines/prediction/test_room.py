"""Tests of pipelines.prediction.room: bytes that a plan has still to write."""

from dataclasses import replace

from pipelines.prediction.cost import Cost
from pipelines.prediction.room import Room, in_words, room_needed
from pipelines.recipe import Recipe

NUM_PARAMETERS = 1000


def cost(num_bytes: int) -> Cost:
    """A prediction of so many bytes."""
    return Cost(
        num_samples=0,
        num_bytes=num_bytes,
        device="cpu",
        device_hours=0.0,
        seconds=None,
        money=None,
        source="",
    )


def test_stages_leave_what_was_predicted(demo_recipe: Recipe) -> None:
    """Those of which nothing is known are named."""
    found = room_needed(demo_recipe, {"ingest": cost(500), "embed/t5": None}, {})
    assert found == Room(num_bytes=500, unknown=("embed/t5",))


def test_training_leaves_its_checkpoints(demo_recipe: Recipe) -> None:
    """Weights, two moments and the average of each that is kept, one more while it is written."""
    base = replace(demo_recipe.base, keep_checkpoints=2, keep_every_images=0)
    recipe = demo_recipe.model_copy(update={"base": base})
    found = room_needed(recipe, {"base": None}, {"base": NUM_PARAMETERS})
    # three checkpoints of four numbers a parameter, and a snapshot
    assert found == Room(num_bytes=(3 * 4 + 1) * 4 * NUM_PARAMETERS)


def test_every_expert_has_checkpoints_of_its_own(demo_recipe: Recipe) -> None:
    """They train side by side, and nobody clears them before the stage is complete."""
    train = replace(demo_recipe.experts.train, keep_checkpoints=1, keep_every_images=0)
    experts = demo_recipe.experts.model_copy(update={"train": train})
    recipe = demo_recipe.model_copy(update={"experts": experts})
    num_experts = len(recipe.experts.intervals(recipe.noise.distribution))
    found = room_needed(recipe, {"experts": cost(7)}, {"base": NUM_PARAMETERS})
    assert found.num_bytes == num_experts * (2 * 4 + 1) * 4 * NUM_PARAMETERS


def test_networks_of_unknown_size_are_named(demo_recipe: Recipe) -> None:
    """Their checkpoints are not taken for nothing."""
    assert room_needed(demo_recipe, {"base": cost(7)}, {}).unknown == ("base",)


def test_words_say_what_is_not_in_the_sum() -> None:
    """And how to learn it."""
    assert in_words(Room(num_bytes=3 * 1024**3)) == "about 3.0 GiB to come"
    words = in_words(Room(unknown=("embed/t5",)))
    assert "without embed/t5" in words
    assert "--probe" in words
