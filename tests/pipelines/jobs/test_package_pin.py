"""The packages that a job must find."""

from importlib.metadata import version

import pytest

from pipelines.errors import UserError
from pipelines.jobs.package_pin import check, differences, digest, lock_of_checkout

PYYAML, PYDANTIC = version("pyyaml"), version("pydantic")
HERE = f"pyyaml=={PYYAML}\npydantic=={PYDANTIC}\n"


def test_the_digest_is_of_packages_alone() -> None:
    """Comments and order say nothing; a version does, and so does one package more."""
    other = f"# words\n\npydantic=={PYDANTIC}\npyyaml=={PYYAML}"
    assert digest(HERE) == digest(other)
    assert digest(HERE).startswith("sha256:")
    assert digest(HERE) != digest(HERE.replace(PYYAML, "1.0"))
    assert digest(HERE) != digest(HERE + "numpy==1.0\n")


def test_what_is_installed_is_compared() -> None:
    """Each difference names both versions; what is for another platform may be absent."""
    lock = f"pyyaml==1.0\nno-such-package==2.0\nnor-this==3 ; sys_platform == 'x'\n{HERE}"
    assert differences(lock) == [
        f"pyyaml {PYYAML} (locked 1.0)",
        "no-such-package missing (locked 2.0)",
    ]


def test_a_job_in_the_right_environment_may_start() -> None:
    """The lock is the expected one, and the packages are its."""
    check(digest(HERE), HERE)


def test_the_lock_of_this_checkout_is_found() -> None:
    """It is what a submission takes along."""
    assert "ray==" in lock_of_checkout()


@pytest.mark.parametrize(
    ("lock", "words"),
    [
        ("", "no requirements.lock lies beside the recipe"),
        (HERE + "numpy==1.0\n", "the requirements.lock beside the recipe is sha256:"),
    ],
)
def test_another_lock_is_refused(lock: str, words: str) -> None:
    """As is none at all."""
    with pytest.raises(UserError, match=words):
        check(digest(HERE), lock)


def test_another_environment_is_refused_by_name() -> None:
    """The first packages that differ are named with both versions, and what to do."""
    lock = "".join(f"no-such-{i:02}==1.0\n" for i in range(12))
    with pytest.raises(
        UserError, match=r"12 packages of .*no-such-07 missing \(locked 1.0\) and 4 more; install"
    ):
        check(digest(lock), lock)
