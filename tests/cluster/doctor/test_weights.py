"""Tests of cluster.doctor.weights: on disk, in a package, in the hub's cache."""

from pathlib import Path

import pytest

from cluster.doctor.weights import check_weights


def test_weights_on_disk_and_in_packages(tmp_path: Path) -> None:
    """A file, a filled folder and an installed module are at hand; an empty folder is not."""
    assert not check_weights("t5", str(tmp_path)).ok
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    assert check_weights("t5", str(tmp_path)).ok
    assert check_weights("t5", str(tmp_path / "model.safetensors")).ok
    assert check_weights("t5", "package:json").ok
    assert not check_weights("t5", "package:no_such_module_anywhere").ok
    assert not check_weights("t5", "package:").ok


def test_weights_in_the_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub name is looked for in the cache, and the remedy is the command that fetches it."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert "hf download google/t5-v1_1-xxl" in check_weights("t5", "google/t5-v1_1-xxl").remedy
    (tmp_path / "models--google--t5-v1_1-xxl" / "snapshots" / "abc").mkdir(parents=True)
    assert check_weights("t5", "google/t5-v1_1-xxl").ok
    assert check_weights("clip", "hf-hub:google/t5-v1_1-xxl").ok


def test_tags_of_open_clip_are_looked_for_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """open_clip alone knows where its tags lie; it is asked where it can fetch nothing."""
    (tmp_path / "open_clip").mkdir()
    (tmp_path / "open_clip" / "__init__.py").touch()
    (tmp_path / "open_clip" / "pretrained.py").write_text(
        "import os\n"
        "def get_pretrained_cfg(model, tag):\n"
        "    return {'tag': tag} if tag != 'none' else {}\n"
        "def download_pretrained(found):\n"
        "    assert os.environ['HF_HUB_OFFLINE'] == '1'\n"
        "    if found['tag'] == 'here':\n"
        "        return '/cache/x.pt'\n"
        "    raise OSError('cannot reach the hub')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert check_weights("clip", "open_clip:ViT-B-32:here").found == "ViT-B-32 here at /cache/x.pt"
    away = check_weights("clip", "open_clip:ViT-B-32:away")
    assert not away.ok
    assert "not at hand (OSError: cannot reach the hub)" in away.found
    assert "open_clip.create_model('ViT-B-32', pretrained='away')" in away.remedy
    assert "knows no such" in check_weights("clip", "open_clip:ViT-B-32:none").found
