"""What became of the samples of one shard, and where the time went."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from ediffi.encoding.encoded_batch import COSINE_ERROR, NUM_INF, NUM_NAN, EncodedBatch
from ediffi.encoding.quantization import TOKENS

TRUNCATED = "caption_too_long:truncated"
NOT_FINITE = "not_finite"
_SIGNIFICANT_DIGITS = 3  # of errors in receipts: the last digits of a sum depend on the machine


@dataclass(frozen=True, kw_only=True)
class EmbedReport:
    """What became of one shard's samples.

    facts: `tokens` (length -> samples), `num_nan`, `num_inf`, `num_truncated` and, with int8,
        `cosine_error` {"mean", "max"} over all tokens: equal for equal inputs.
    timings: seconds and fractions of this run, see `Clock`.
    """

    num_in: int
    num_out: int
    rejects: Mapping[str, Sequence[str]]  # reason -> keys left out
    flagged: Mapping[str, Sequence[str]]  # reason -> keys kept, though altered
    facts: Mapping[str, Any]
    timings: Mapping[str, float]


@dataclass
class Tally:
    """Counts by position in the shard, so that reports are in its order whatever came first."""

    keys: Sequence[str]
    reasons: dict[int, str] = field(default_factory=dict)
    truncated: list[int] = field(default_factory=list)
    tokens: Counter[int] = field(default_factory=Counter)
    num_nan: int = 0
    num_inf: int = 0
    error_sum: float = 0.0
    error_max: float = 0.0
    has_error: bool = False

    def reject(self, position: int, reason: str) -> None:
        self.reasons[position] = reason

    def count(self, positions: Sequence[int], batch: EncodedBatch) -> list[bool]:
        """Take in one batch; which of its samples are finite."""
        num_nan_B, num_inf_B = batch.checks[NUM_NAN], batch.checks[NUM_INF]
        self.num_nan += int(num_nan_B.sum())
        self.num_inf += int(num_inf_B.sum())
        sound_B = (num_nan_B + num_inf_B) == 0
        for position, sound, length in zip(positions, sound_B.tolist(), batch.lengths):
            if not sound:
                self.reject(position, NOT_FINITE)
            elif TOKENS in batch.tensors:
                self.tokens[length] += 1
        if COSINE_ERROR in batch.checks:
            error_BT = batch.checks[COSINE_ERROR][sound_B]
            self.has_error = True
            self.error_sum += float(error_BT.double().sum())
            self.error_max = max(self.error_max, float(error_BT.max()) if len(error_BT) else 0.0)
        return sound_B.tolist()

    def report(self, clock: Clock) -> EmbedReport:
        rejects: dict[str, list[str]] = {
            reason: [] for reason in sorted(set(self.reasons.values()))
        }
        for position in sorted(self.reasons):
            rejects[self.reasons[position]].append(self.keys[position])
        kept = [self.keys[p] for p in sorted(self.truncated) if p not in self.reasons]
        facts: dict[str, Any] = {"num_nan": self.num_nan, "num_inf": self.num_inf}
        if self.tokens:
            facts["tokens"] = {str(length): self.tokens[length] for length in sorted(self.tokens)}
            facts["num_truncated"] = len(kept)
        if self.has_error:
            num_tokens = sum(length * count for length, count in self.tokens.items())
            mean = self.error_sum / max(1, num_tokens)
            facts["cosine_error"] = {"mean": _rounded(mean), "max": _rounded(self.error_max)}
        num_out = len(self.keys) - len(self.reasons)
        return EmbedReport(
            num_in=len(self.keys),
            num_out=num_out,
            rejects=rejects,
            flagged={TRUNCATED: kept} if kept else {},
            facts=facts,
            timings=clock.timings(num_out),
        )


def _rounded(value: float) -> float:
    return float(f"{value:.{_SIGNIFICANT_DIGITS}g}")


class Clock:
    """Where the time of one shard goes.

    `decode_wait_s` and `write_wait_s` are what the encoder waited for others, `encode_s` is its
    own time on the device, and what is left of `1 - encode_s / total` is `device_idle_fraction`.
    `padding_waste_fraction` is the share of token positions that were computed and thrown away.
    """

    def __init__(self, device: str) -> None:
        self._start = time.perf_counter()
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._device = device
        self._passes: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._num_padded = self._num_real = 0

    @contextmanager
    def waiting(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - start

    @contextmanager
    def encoding(self) -> Iterator[None]:
        """Time one pass: on the GPU by its own events, which wait for nothing."""
        if not self._device.startswith("cuda"):
            with self.waiting("encode_s"):
                yield
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        stream = torch.cuda.current_stream(self._device)
        begin.record(stream)
        yield
        end.record(stream)
        self._passes.append((begin, end))

    def count_padding(self, stored_lengths: Sequence[int], real_lengths: Sequence[int]) -> None:
        self._num_padded += max(stored_lengths) * len(stored_lengths)
        self._num_real += sum(real_lengths)

    def timings(self, num_samples: int) -> dict[str, float]:
        total_s = time.perf_counter() - self._start
        for begin, end in self._passes:
            self._seconds["encode_s"] += begin.elapsed_time(end) / 1000
        waste = 1 - self._num_real / self._num_padded if self._num_padded else 0.0
        fractions = {
            "padding_waste_fraction": waste,
            "device_idle_fraction": max(0.0, 1 - self._seconds["encode_s"] / total_s),
            "samples_per_s": num_samples / total_s,
        }
        names = ("decode_wait_s", "encode_s", "write_wait_s")
        seconds = {name: self._seconds[name] for name in names}
        return {name: round(value, 4) for name, value in {**seconds, **fractions}.items()}
