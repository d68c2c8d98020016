"""What a driver does before it runs a recipe that came from elsewhere."""

from argparse import Namespace
from importlib.metadata import version
from pathlib import Path

import pytest
from botocore.exceptions import EndpointConnectionError, NoCredentialsError

from pipelines.errors import RetryableError, UserError
from pipelines.jobs.job_start import prepared
from pipelines.jobs.package_pin import digest
from pipelines.store.location import location, write_atomically

LOCK = f"pyyaml=={version('pyyaml')}\n"


def options_of(recipe: str, expected: str = "", required: tuple[str, ...] = ()) -> Namespace:
    """Options of `ediffi run`."""
    return Namespace(recipe=recipe, expect_environment=expected, require_environment=list(required))


def test_a_recipe_in_a_bucket_is_fetched(s3_store: str) -> None:
    """The command gets a file with its text, for as long as it takes."""
    write_atomically(location(s3_store) / "recipe.yaml", "name: far\n")
    seen: list[Path] = []

    def command(options: Namespace) -> int:
        seen.append(Path(options.recipe))
        assert seen[0].read_text() == "name: far\n"
        return 7

    assert prepared(command)(options_of(f"{s3_store}/recipe.yaml")) == 7
    assert seen[0].suffix == ".yaml"
    assert not seen[0].exists()


def test_a_recipe_that_is_not_in_the_bucket_is_told(s3_store: str) -> None:
    """With its whole address."""
    with pytest.raises(UserError, match=f"no recipe at {s3_store}/recipe.yaml"):
        prepared(lambda options: 0)(options_of(f"{s3_store}/recipe.yaml"))


def test_a_recipe_on_this_machine_stays_what_it_is() -> None:
    """A name of the package, or a path."""
    seen: list[str] = []
    prepared(lambda options: seen.append(options.recipe))(options_of("demo"))
    assert seen == ["demo"]


def test_the_environment_is_checked_before_anything_else(tmp_path: Path) -> None:
    """The lock beside the recipe must be the expected one, and the packages its."""
    (tmp_path / "requirements.lock").write_text(LOCK)
    calls: list[int] = []
    start = prepared(lambda options: calls.append(1))
    recipe = str(tmp_path / "recipe.yaml")
    start(options_of(recipe, digest(LOCK)))
    assert calls == [1]
    with pytest.raises(UserError, match="expected was sha256:other"):
        start(options_of(recipe, "sha256:other"))
    (tmp_path / "requirements.lock").write_text("pyyaml==1.0\n")
    with pytest.raises(UserError, match=r"pyyaml .* \(locked 1\.0\)"):
        start(options_of(recipe, digest("pyyaml==1.0\n")))
    (tmp_path / "requirements.lock").unlink()
    with pytest.raises(UserError, match=r"no requirements\.lock lies beside"):
        start(options_of(recipe, digest(LOCK)))
    assert calls == [1]


def test_variables_that_do_not_travel_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are missing, or empty, are named before anything is done; values are not."""
    monkeypatch.setenv("OUR_PASSWORD", "hidden-value")
    monkeypatch.setenv("OUR_EMPTY", "")
    monkeypatch.delenv("OUR_KEY", raising=False)
    calls: list[int] = []
    start = prepared(lambda options: calls.append(1))
    start(options_of("demo", required=("OUR_PASSWORD",)))
    assert calls == [1]
    words = r"--require-environment: OUR_KEY, OUR_EMPTY must be set .* where `ray start` runs"
    with pytest.raises(UserError, match=words) as caught:
        start(options_of("demo", required=("OUR_PASSWORD", "OUR_KEY", "OUR_EMPTY")))
    assert "hidden-value" not in str(caught.value)
    assert calls == [1]


@pytest.mark.parametrize("recipe", ["foo://bucket/recipe.yaml"])
@pytest.mark.parametrize("expected", ["", "sha256:other"])
def test_a_place_that_is_none_is_refused(recipe: str, expected: str) -> None:
    """With what a recipe may be."""
    with pytest.raises(UserError, match=r"recipe must be .*got 'foo://bucket/recipe\.yaml'"):
        prepared(lambda options: 0)(options_of(recipe, expected))


@pytest.mark.parametrize("expected", ["", "sha256:other"])
@pytest.mark.parametrize(
    ("error", "words"),
    [
        (NoCredentialsError(), "there are no credentials for it"),
        (EndpointConnectionError(endpoint_url="http://x"), "the store does not answer"),
        (OSError("odd"), "could not be read"),
    ],
)
def test_a_bucket_that_cannot_be_read_may_be_read_later(
    error: Exception, words: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recipe, or the lock beside it: the code is that of what may pass."""

    def fails(place: object) -> str:
        raise error

    monkeypatch.setattr("pipelines.jobs.job_start.read_text", fails)
    with pytest.raises(RetryableError, match=r"s3://bucket/.* could not be read") as caught:
        prepared(lambda options: 0)(options_of("s3://bucket/recipe.yaml", expected))
    assert words in str(caught.value)
