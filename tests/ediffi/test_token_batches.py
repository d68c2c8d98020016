"""How captions are put together: every one once, little padding, nothing left to chance."""

import random

import pytest

from ediffi.encoders import token_batches


@pytest.fixture
def lengths() -> list[int]:
    """Lengths of 3000 captions, as skewed as those of COCO."""
    draw = random.Random(0)
    return [min(77, max(3, round(draw.lognormvariate(2.55, 0.35)))) for _ in range(3000)]


@pytest.mark.parametrize("budget_tokens", [16, 256, 1024, 8192])
def test_every_caption_is_in_one_batch_within_the_budget(lengths, budget_tokens):
    """No batch, padded, exceeds the budget, unless it is a single long caption."""
    batches = list(token_batches(lengths, budget_tokens))
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        padded = len(batch) * max(lengths[i] for i in batch)
        assert padded <= budget_tokens or len(batch) == 1


@pytest.mark.parametrize("budget_tokens", [1024, 8192])
def test_little_is_padding(lengths, budget_tokens):
    """Padding stays below a tenth, where batches in the order of the shard would waste half."""
    batches = list(token_batches(lengths, budget_tokens))
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    assert 1 - sum(lengths) / padded < 0.1
    in_order = [lengths[i : i + 64] for i in range(0, len(lengths), 64)]
    assert 1 - sum(lengths) / sum(len(part) * max(part) for part in in_order) > 0.4


def test_the_longest_come_first(lengths):
    """A batch too large for the device fails at once, not after an hour."""
    first, *_, last = token_batches(lengths, 1024)
    assert max(lengths[i] for i in first) == max(lengths)
    assert min(lengths[i] for i in last) == min(lengths)


def test_equal_lengths_keep_their_order():
    """Ties are broken by position, so that a shard has one way to be cut."""
    assert list(token_batches([5, 5, 5, 5], 10)) == [[0, 1], [2, 3]]
    assert list(token_batches([], 10)) == []
    assert list(token_batches([30, 2], 10)) == [[0], [1]]
