"""Checkpoints are whole or invisible, whatever is torn, killed or full; any ranks read them."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import ediffi
from ediffi.train import checkpoint_writer
from ediffi.train.checkpoint import (
    CheckpointError,
    CheckpointStore,
    Progress,
    kept_images,
    open_checkpoint,
)
from ediffi.train.checkpoint_file import Marker, Piece
from ediffi.train.checkpoint_writer import BackgroundSave
from ediffi.train.engine import Worker, join_process_group
from ediffi.train.state import Fragment

SIZES = {"first.weight": 12, "second.weight": 7}
NEWEST = "images-0000000200"


class Training:
    """Two parameters with one moment each, and a store; each save has its own values.

    Args:
        directory: of the checkpoints.
        settings: of the store.
    """

    def __init__(self, directory: Path, **settings: Any) -> None:
        self.fragments = [Fragment(name, 0, torch.zeros(size)) for name, size in SIZES.items()]
        self.moments = [torch.zeros(size) for size in SIZES.values()]
        settings = {"keep": 2, "keep_every_images": 0} | settings
        self.store = CheckpointStore(directory, worker=join_process_group(), **settings)

    def begin_save(self, images_seen: int) -> None:
        """Fill the tensors with numbers that tell `images_seen`, and save them."""
        for fragment, moment in zip(self.fragments, self.moments):
            fragment.weights.copy_(torch.arange(fragment.num_elements) + images_seen)
            moment.fill_(-images_seen)
        payload = {"weights": [f.weights for f in self.fragments], "exp_avg": self.moments}
        self.store.save(self.fragments, payload, Progress(images_seen=images_seen, loss=0.5))

    def save(self, *images_seen: int) -> None:
        """Save one after the other, each complete."""
        for images in images_seen:
            self.begin_save(images)
            self.store.wait()

    def loaded(self) -> int:
        """Load the newest sound checkpoint, check every value; images seen, 0 if there is none."""
        checkpoint = self.store.load_newest()
        if checkpoint is None:
            return 0
        images = checkpoint.progress.images_seen
        for name, size in SIZES.items():
            weights = checkpoint.read("weights", name, 0, size)
            assert torch.equal(weights, torch.arange(size) + float(images))
            assert (checkpoint.read("exp_avg", name, 0, size) == -images).all()
        return images


def names(directory: Path) -> list[str]:
    """Everything in the directory, hidden or not."""
    return sorted(path.name for path in directory.iterdir())


# -- files ----------------------------------------------------------------------------------------


def test_every_number_comes_back(tmp_path: Path) -> None:
    """Weights, moments and progress; losses that are not finite too."""
    training = Training(tmp_path)
    progress = Progress(
        images_seen=64,
        loss=math.nan,
        num_steps=4,
        lr_factor=0.5,
        num_spikes=1,
        norm_mean=1.25,
        loss_sums=((0.1, math.inf), (1 / 3, 2.0)),
    )
    weights = [torch.randn(size) for size in SIZES.values()]
    training.store.save(training.fragments, {"weights": weights, "ema_std_0.05": weights}, progress)

    checkpoint = training.store.load_newest()

    assert checkpoint is not None
    assert checkpoint.kinds == {"weights", "ema_std_0.05"}
    for (name, size), expected in zip(SIZES.items(), weights):
        assert torch.equal(checkpoint.read("ema_std_0.05", name, 0, size), expected)
        assert torch.equal(checkpoint.read("weights", name, 3, 2), expected[3:5])
    assert math.isnan(checkpoint.progress.loss)
    assert replace(checkpoint.progress, loss=0.0) == replace(progress, loss=0.0)


def test_what_is_saved_is_what_was_there(tmp_path: Path) -> None:
    """Training changes the tensors while the thread writes; the checkpoint does not see it."""
    training = Training(tmp_path)
    training.begin_save(100)
    for tensor in [*training.moments, *(f.weights for f in training.fragments)]:
        tensor.fill_(math.nan)

    assert training.loaded() == 100


def test_files_are_safetensors_that_say_where_they_begin(tmp_path: Path) -> None:
    """The library's own reader finds the pieces; the marker alone is JSON."""
    Training(tmp_path).save(100)

    path = tmp_path / "images-0000000100"
    assert names(path) == ["complete.json", "rank-00000.safetensors"]
    tensors = load_file(path / "rank-00000.safetensors")
    assert tensors.keys() == {f"{kind}/{name}" for kind in ("weights", "exp_avg") for name in SIZES}
    assert torch.equal(tensors["weights/second.weight"], torch.arange(7) + 100.0)
    record = json.loads((path / "complete.json").read_text())
    assert record["progress"]["images_seen"] == 100
    assert record["files"].keys() == {"rank-00000.safetensors"}


def save_by_ranks(directory: Path, held: Sequence[Sequence[Piece]]) -> None:
    """Publish a checkpoint of 100 images to which each rank gives what it holds."""

    def publish(partial: Path, marker: Marker) -> None:
        partial.rename(directory)
        marker.publish(directory)

    partial = directory.with_name(".partial-100-0")
    saves = [
        BackgroundSave(
            partial,
            pieces,
            Progress(images_seen=100),
            Worker(rank, len(held), torch.device("cpu")),
            publish,
        )
        for rank, pieces in enumerate(held)
    ]
    assert [save.join() for save in saves] == [None] * len(held)


def test_any_slice_is_read_out_of_any_ranks_files(tmp_path: Path) -> None:
    """Three ranks hold uneven parts of one parameter; every slice of it is found again."""
    whole = torch.randn(10)
    cuts = [(0, 3), (3, 9), (9, 10)]
    held = [[Piece("weights", "a", low, whole[low:high].clone())] for low, high in cuts]
    save_by_ranks(tmp_path / "images-100", held)

    checkpoint = open_checkpoint(tmp_path / "images-100")

    assert names(checkpoint.path) == [
        "complete.json",
        *(f"rank-0000{r}.safetensors" for r in range(3)),
    ]
    for low in range(10):
        for high in range(low, 11):
            assert torch.equal(checkpoint.read("weights", "a", low, high - low), whole[low:high])


@pytest.mark.parametrize(
    ("kind", "name", "start", "message"),
    [
        ("weights", "b", 0, r"must hold weights of b from element 0 to 4, but has 0 of them"),
        ("ema", "a", 0, r"must hold ema of a .* it has weights\."),
        ("weights", "a", 8, r"must hold weights of a from element 8 to 12, but has 2 of them"),
    ],
)
def test_what_is_not_there_is_an_error(
    tmp_path: Path, kind: str, name: str, start: int, message: str
) -> None:
    """The error names kind, parameter and elements: never uninitialised memory."""
    save_by_ranks(tmp_path / "images-100", [[Piece("weights", "a", 0, torch.zeros(10))]])

    with pytest.raises(ValueError, match=message):
        open_checkpoint(tmp_path / "images-100").read(kind, name, start, 4)


# -- torn checkpoints -----------------------------------------------------------------------------


def cut(path: Path) -> None:
    """Lose the second half of a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def unlink(path: Path) -> None:
    """Lose a file."""
    path.unlink()


def flip(path: Path) -> None:
    """Change one bit of a file's last byte."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def reformat(path: Path) -> None:
    """Write the marker as a later version might."""
    path.write_text(json.dumps({"format": 99, "parts": []}))


DAMAGES = [
    ("rank-00000.safetensors", cut),
    ("rank-00000.safetensors", unlink),
    ("rank-00000.safetensors", flip),
    ("complete.json", cut),
    ("complete.json", unlink),
    ("complete.json", reformat),
]


@pytest.mark.parametrize(("name", "damage"), DAMAGES)
def test_torn_newest_is_passed_over_with_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, damage: Callable[[Path], None]
) -> None:
    """The one before is loaded, and the log names the checkpoint and the file."""
    training = Training(tmp_path)
    training.save(100, 200)
    damage(tmp_path / NEWEST / name)

    with caplog.at_level(logging.WARNING):
        assert training.loaded() == 100

    (warning,) = caplog.messages
    assert NEWEST in warning
    assert name in warning
    with pytest.raises(CheckpointError, match=f"{NEWEST} is not sound: {name}"):
        open_checkpoint(tmp_path / NEWEST)


@pytest.mark.parametrize(("name", "damage"), DAMAGES)
def test_torn_checkpoint_is_replaced_when_training_gets_there_again(
    tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    """Saving under the name of a damaged checkpoint makes it sound, and leaves nothing of it."""
    training = Training(tmp_path)
    training.save(100, 200)
    damage(tmp_path / NEWEST / name)
    assert training.loaded() == 100
    training.save(200)

    assert training.loaded() == 200
    assert names(tmp_path) == ["images-0000000100", NEWEST]


def test_nothing_sound_is_the_beginning(tmp_path: Path) -> None:
    """An empty directory, and one whose only checkpoint is torn."""
    training = Training(tmp_path)
    assert training.loaded() == 0
    training.save(200)
    cut(tmp_path / NEWEST / "rank-00000.safetensors")
    assert training.loaded() == 0


def test_leftovers_of_a_killed_save_are_removed(tmp_path: Path) -> None:
    """A partial directory of an earlier attempt neither counts nor stays."""
    (tmp_path / ".partial-300-dead").mkdir(parents=True)

    assert Training(tmp_path).loaded() == 0
    assert names(tmp_path) == []


def test_sound_checkpoint_stays_until_its_replacement_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the new files and their marker, the old checkpoint still counts."""
    training = Training(tmp_path, keep=1)
    training.save(200)

    def die(self: Marker, path: Path) -> None:
        raise OSError("killed here")

    with monkeypatch.context() as patch:
        patch.setattr(Marker, "publish", die)
        with pytest.raises(CheckpointError, match="killed here"):
            training.save(200)

    assert training.loaded() == 200
    training.save(300)
    assert names(tmp_path) == ["images-0000000300"]


# -- keeping --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "keep", "keep_every_images", "kept"),
    [
        ([20, 100, 1000], 2, 0, {100, 1000}),
        ([10, 20, 30, 40, 50], 1, 20, {20, 40, 50}),
        ([16, 32, 48, 64, 80], 1, 30, {32, 64, 80}),  # the first at or after each multiple
        ([70, 80], 1, 60, {70, 80}),
        ([], 3, 10, set()),
    ],
)
def test_what_is_kept(images: list[int], keep: int, keep_every_images: int, kept: set[int]) -> None:
    """The newest, and the first checkpoint of each stretch of images."""
    assert kept_images(images, keep, keep_every_images) == kept


def test_policy_deletes_as_training_goes(tmp_path: Path) -> None:
    """Counts sort by number, not by text; what every stretch keeps stays for good."""
    Training(tmp_path, keep=1, keep_every_images=90).save(20, 100, 180, 200, 1000)

    assert names(tmp_path) == [f"images-{images:010d}" for images in (100, 180, 1000)]


def test_torn_ones_do_not_push_out_sound_ones(tmp_path: Path) -> None:
    """Of two checkpoints to keep, one known to be torn is not one; what cannot be read stays."""
    training = Training(tmp_path)
    training.save(100, 200)
    flip(tmp_path / NEWEST / "rank-00000.safetensors")
    assert training.loaded() == 100
    training.save(150)
    assert names(tmp_path) == ["images-0000000100", "images-0000000150"]

    reformat(tmp_path / "images-0000000150" / "complete.json")
    training.save(160, 170)
    assert names(tmp_path) == [f"images-{images:010d}" for images in (150, 160, 170)]


# -- beside the training --------------------------------------------------------------------------


def test_save_returns_before_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training goes on while the thread writes; the next save waits for it."""
    may_write, order = threading.Event(), []
    write = checkpoint_writer.write_pieces

    def write_later(path: Path, pieces: Sequence[Piece]) -> str:
        assert may_write.wait(10)
        order.append(f"written {path.parent.name.split('-')[1]}")
        return write(path, pieces)

    monkeypatch.setattr(checkpoint_writer, "write_pieces", write_later)
    training = Training(tmp_path)
    training.begin_save(100)
    assert not list(tmp_path.glob("images-*"))
    order.append("trained on")
    threading.Timer(0.2, may_write.set).start()
    training.begin_save(200)
    order.append("second save returned")
    training.store.wait()

    assert order[:2] == ["trained on", "written 100"]
    assert set(order[2:]) == {"second save returned", "written 200"}
    assert training.loaded() == 200


def full_disk(path: Path, pieces: Sequence[Piece]) -> str:
    """Fail as a full disk does, in the middle of a file."""
    path.write_bytes(b"half")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


@pytest.mark.parametrize("asks", ["save", "wait", "load_newest", "close"])
def test_full_disk_is_told_by_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asks: str
) -> None:
    """The error says what to do; older checkpoints and the room on the disk are as before."""
    training = Training(tmp_path)
    training.save(100)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_writer, "write_pieces", full_disk)
        training.begin_save(200)
        calls = {
            "save": lambda: training.begin_save(300),
            "wait": training.store.wait,
            "load_newest": training.store.load_newest,
            "close": training.store.close,
        }
        with pytest.raises(CheckpointError, match=r"of 200 images .*No space left.*make room"):
            calls[asks]()

    assert names(tmp_path) == ["images-0000000100"]
    assert training.loaded() == 100
    training.save(300)
    assert training.loaded() == 300


def test_failure_of_another_rank_reaches_rank_0(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 says who failed and why, at once, and completes nothing."""
    write = checkpoint_writer.write_pieces

    def write_unless_1(path: Path, pieces: Sequence[Piece]) -> str:
        return (
            full_disk(path, pieces)
            if path.name == "rank-00001.safetensors"
            else write(path, pieces)
        )

    monkeypatch.setattr(checkpoint_writer, "write_pieces", write_unless_1)
    published: list[Path] = []
    piece = Piece("weights", "a", 0, torch.zeros(3))
    saves = [
        BackgroundSave(
            tmp_path / ".partial-100-0",
            [piece],
            Progress(images_seen=100),
            Worker(rank, 2, torch.device("cpu")),
            lambda path, marker: published.append(path),
        )
        for rank in range(2)
    ]
    errors = [save.join() for save in saves]

    assert "rank 1: [Errno 28] No space left" in str(errors[0])
    assert "No space left" in str(errors[1])
    assert published == []
    assert names(tmp_path) == []


def test_closing_does_not_wait_for_the_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When training has ended, rank 0 gives a rank that never reports only a short while."""
    monkeypatch.setattr(checkpoint_writer, "_CLOSING_DEADLINE_S", 0.1)
    save = BackgroundSave(
        tmp_path / ".partial-100-0",
        [],
        Progress(images_seen=100),
        Worker(0, 2, torch.device("cpu")),
        lambda path, marker: None,
    )
    save.hurry()

    assert "rank 1 has not written its part in time" in str(save.join())


# -- killed ---------------------------------------------------------------------------------------


def save_for_ever(directory: Path) -> None:
    """Save one checkpoint after the other until killed."""
    training = Training(directory)
    for images in range(training.loaded() + 1, 10**9):
        training.begin_save(images)


def be_killed(directory: Path, num_kills: int) -> None:
    """Kill a child at random moments of saving; after each, what is visible must be whole."""
    torch.set_num_threads(1)
    moments, found = random.Random(0), [0]
    for _ in range(num_kills):
        child = os.fork()
        if not child:
            save_for_ever(directory)
        time.sleep(0.1 + 0.2 * moments.random())
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        for path in directory.glob("images-*/complete.json"):
            open_checkpoint(path.parent)
        newest = sorted(path.parent for path in directory.glob("images-*/complete.json"))
        found.append(open_checkpoint(newest[-1]).progress.images_seen if newest else 0)
    assert found == sorted(found), found
    print(found[-1])


@pytest.mark.slow
def test_kill_leaves_nothing_or_a_whole_checkpoint(tmp_path: Path) -> None:
    """SIGKILL at twenty random moments of continual saving; the newest never goes back."""
    outcome = subprocess.run(
        [sys.executable, __file__, str(tmp_path), "20"],
        env=os.environ | {"PYTHONPATH": str(Path(ediffi.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=120,
    )

    assert outcome.returncode == 0, outcome.stderr
    assert int(outcome.stdout) > 20


if __name__ == "__main__":
    be_killed(Path(sys.argv[1]), int(sys.argv[2]))
