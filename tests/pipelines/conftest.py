"""What tests of the orchestrator share: the demo recipe, an empty store and one Ray."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.cli import main
from pipelines.recipe import Recipe
from pipelines.recipe_file import load_recipe
from pipelines.store.ledger import Ledger
from tests.pipelines import fake_stages, in_process
from tests.pipelines.fake_stages import FakeStage


@pytest.fixture(scope="session")
def demo_recipe() -> Recipe:
    """The recipe of `ediffi demo`."""
    return load_recipe("demo")


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """The ledger of an empty store."""
    return Ledger.open(tmp_path / "store")


@pytest.fixture
def ediffi(ledger: Ledger, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple]:
    """Call it with words of a command line to get exit code, stdout and stderr."""

    def call(*words: str) -> tuple[int, str, str]:
        code = main(["--store", str(ledger.store), *words])
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def run_here(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs do their units in this process, without Ray; the list gets the units that were done."""
    done: list[str] = []

    def run(*arguments: Any, **options: Any) -> None:
        done.extend(in_process.run_recipe(*arguments, **options))

    monkeypatch.setattr("pipelines.workflow.run_recipe", run)
    return done


@pytest.fixture
def use_stages(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Call it with stages: whatever the recipe, these are planned and run."""

    def use(*stages: FakeStage) -> None:
        monkeypatch.setattr("pipelines.planning.build_stages", lambda recipe: list(stages))

    return use


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One Ray on this machine for the whole session, started as a run starts it."""
    import ray

    from pipelines.driver.ray_cluster import connect

    # Workers cannot import test modules: the stages travel with their code.
    ray.cloudpickle.register_pickle_by_value(fake_stages)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        connect()
    yield
    ray.shutdown()
    ray.cloudpickle.unregister_pickle_by_value(fake_stages)
