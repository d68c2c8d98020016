"""Tests of pipelines.masking: what must not be read by others, and what must stay readable."""

import pytest

from cluster import fields
from pipelines import masking
from pipelines.masking import is_secret_name, masker


@pytest.mark.parametrize(
    ("name", "is_secret"),
    [
        ("AWS_SECRET_ACCESS_KEY", True),
        ("AWS_SESSION_TOKEN", True),
        ("RAY_AUTH_TOKEN", True),
        ("MLFLOW_TRACKING_PASSWORD", True),
        ("EDIFFI_WEBHOOK_URL", True),
        ("HF_TOKEN", True),
        ("GITHUB_PAT", True),
        ("GITHUBTOKEN", True),
        ("PGPASSWORD", True),
        ("MYSQL_PWD", True),
        ("DB_PASS", True),
        ("WANDB_KEY", True),
        ("BASIC_AUTH", True),
        ("PWD", False),
        ("OLDPWD", False),
        ("RAY_AUTH_TOKEN_PATH", False),
        ("RAY_AUTH_MODE", False),
        ("TOKENIZERS_PARALLELISM", False),
        ("AWS_ACCESS_KEY_ID", False),
        ("PATH", False),
        ("KEYBOARD", False),
    ],
)
def test_names_of_variables_tell_secrets(name: str, is_secret: bool) -> None:
    """A part of the name counts; what only refers to a secret is none. Profiles go by the same."""
    assert is_secret_name(name) is is_secret
    assert fields.is_secret_name(name) is is_secret


def test_profiles_and_logs_know_the_same_words() -> None:
    """Neither package imports the other, so each has the list; they must not drift apart."""
    assert fields.SECRET_PARTS == masking.SECRET_PARTS
    assert fields.SECRET_ENDS == masking.SECRET_ENDS
    assert fields.HARMLESS_ENDS == masking.HARMLESS_ENDS


def test_values_of_secret_variables_are_taken_out() -> None:
    """Wherever they stand, each line of a key of several; short and harmless ones stay."""
    environment = {
        "RAY_AUTH_TOKEN": "hunter2hunter2",
        "TLS_PRIVATE_KEY": "-----BEGIN KEY-----\nMIIabcdef\n",
        "SHORT_TOKEN": "on",
        "HOME": "/home/somebody",
    }
    mask = masker(environment)
    text = "xhunter2hunter2x MIIabcdef on /home/somebody"
    assert mask(text) == "x***x *** on /home/somebody"


def test_a_secret_that_begins_another_leaves_no_rest() -> None:
    """The longer one is taken out first."""
    mask = masker({"A_TOKEN": "abcdefgh", "B_TOKEN": "abcdefghijkl"})
    assert mask("abcdefghijkl abcdefgh") == "*** ***"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("at postgresql://me:pa55@db:5432/x", "at postgresql://me:***@db:5432/x"),
        (
            "https://me:p-w@host/a and http://host:5000/b",
            "https://me:***@host/a and http://host:5000/b",
        ),
        ("https://s3cr3ttoken@host:5000/a", "https://***@host:5000/a"),
        ("Authorization: Bearer abc.def-ghi", "Authorization: Bearer ***"),
        ("key AKIAABCDEFGHIJKLMNOP used", "key *** used"),
        ("aws_secret_access_key = wJalrXUtnFEMI/K7", "aws_secret_access_key = ***"),
        ('{"password": "opensesame"}', '{"password": "***"}'),
        (
            "https://b.s3.org/k?X-Amz-Signature=ab12&x=1",
            "https://b.s3.org/k?X-Amz-Signature=***&x=1",
        ),
        ("https://hooks.slack.com/services/T0/B0/xyz", "https://hooks.slack.com/***"),
        ("token hf_abcdefghijklmnopqrstuvwx", "token ***"),
        ("113 tokens, max_tokens=113, key=a", "113 tokens, max_tokens=113, key=a"),
        ("s3://bucket/prefix and a@b:c", "s3://bucket/prefix and a@b:c"),
        ("loss 0.25 after 3:04 h", "loss 0.25 after 3:04 h"),
    ],
)
def test_what_looks_like_a_secret_is_taken_out(text: str, shown: str) -> None:
    """Passwords, keys and signatures go; everything else stays as it was."""
    assert masker({})(text) == shown
