"""Who says which style a picture is drawn in: a small network trained on the real pictures alone.

Features made for photographs tell the three styles apart in 86 of 100 held-out pictures; pixels do
in 98. Noise on its training pictures is there so that the grain of a drawing does not decide.

Shape legend: B batch, C channels, H W pixels, S styles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.claims.data import STYLES, read_emoji
from benchmarks.claims.judges import read_pictures
from benchmarks.claims.results import Results
from ediffi.train.data import to_unit_range

EPOCHS = 14
MAX_NOISE = 0.1  # deviation on pictures in [-1, 1]; each has its own, up to this
_BATCH_PICTURES = 64
_MAX_LR = 4e-3
_SEED = 0


@dataclass(frozen=True, kw_only=True)
class StyleJudge:
    """The trained judge, as a job."""

    emoji: str

    def run(self, results: Results) -> dict[str, Tensor]:
        """Train on the training pictures; the network's state as one vector, float32."""
        folder = Path(self.emoji)
        rows = [row for row in read_emoji(folder) if row["split"] == "train"]
        network = _train(
            to_unit_range(read_pictures(folder, rows)),
            torch.tensor([list(STYLES).index(row["style"]) for row in rows]),
        )
        return {"state": torch.cat([one.flatten() for one in _state(network)])}

    def judge(self, results: Results, pictures_BCHW: Tensor) -> list[str]:
        """The style of each uint8 picture, once the job is done."""
        network = _network().eval()
        places = _state(network)
        with torch.no_grad():
            values = results[self].split([one.numel() for one in places])
            for place, value in zip(places, values, strict=True):
                place.copy_(value.view_as(place))
            scores_BS = network(to_unit_range(pictures_BCHW))
        return [list(STYLES)[index] for index in scores_BS.argmax(1).tolist()]


def agreement(found: Sequence[str], wanted: Sequence[str]) -> list[float]:
    """1 where a picture has the style it should have, else 0."""
    return [float(one == other) for one, other in zip(found, wanted, strict=True)]


def _train(x_BCHW: Tensor, target_B: Tensor) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(_SEED)
        network = _network().train()
        num_steps = len(x_BCHW) // _BATCH_PICTURES
        optimizer = torch.optim.AdamW(network.parameters(), lr=_MAX_LR, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, _MAX_LR, total_steps=EPOCHS * num_steps
        )
        for epoch in range(EPOCHS):
            order_B = torch.randperm(len(x_BCHW))
            for chosen_B in order_B[: num_steps * _BATCH_PICTURES].view(num_steps, -1):
                seen_BCHW = x_BCHW[chosen_B]
                if epoch % 2:  # every other time as in a mirror
                    seen_BCHW = seen_BCHW.flip(3)
                deviation_B111 = MAX_NOISE * torch.rand(len(seen_BCHW), 1, 1, 1)
                seen_BCHW = seen_BCHW + deviation_B111 * torch.randn_like(seen_BCHW)
                loss = functional.cross_entropy(
                    network(seen_BCHW), target_B[chosen_B], label_smoothing=0.05
                )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return network


def _state(network: nn.Module) -> list[Tensor]:
    """Weights, and means and variances of the normalisations."""
    return [one.detach() for one in network.state_dict().values() if one.is_floating_point()]


def _network() -> nn.Sequential:
    return nn.Sequential(
        *_block(3, 32),
        *_block(32, 32),
        nn.MaxPool2d(2),
        *_block(32, 64),
        *_block(64, 64),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(64, len(STYLES)),
    )


def _block(num_in: int, num_out: int) -> list[nn.Module]:
    convolution = nn.Conv2d(num_in, num_out, 3, padding=1)
    return [convolution, nn.BatchNorm2d(num_out), nn.ReLU()]
