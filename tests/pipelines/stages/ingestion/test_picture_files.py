"""Tests of pipelines.stages.ingestion.picture_files."""

from pathlib import Path

from pipelines.stages.ingestion.picture_files import Fetched, find_pictures, local_path
from pipelines.stages.ingestion.rejects import Rejection
from pipelines.stages.ingestion.source_list import Row
from pipelines.store.location import location
from tests.pipelines.stages.ingest_inputs import write_pictures


def find(folder: str, addresses: list[str], scratch: Path) -> Fetched:
    rows = [
        Row(index=i, key=str(i), address=address, caption="c", columns={}, is_duplicate=False)
        for i, address in enumerate(addresses)
    ]
    return find_pictures(rows, location(folder), max_bytes=4, scratch=scratch)


def test_paths_stay_inside_the_folder(tmp_path: Path) -> None:
    """Parent directories, absolute paths and links that lead out are refused, an inner link not."""
    folder = tmp_path / "pictures"
    write_pictures(folder, 1)
    (tmp_path / "secret.png").touch()
    (folder / "out.png").symlink_to(tmp_path / "secret.png")
    (folder / "in.png").symlink_to(folder / "0.png")
    for unsafe in ("../secret.png", str(tmp_path / "secret.png"), "out.png", "x/../0.png"):
        result = local_path(folder, unsafe)
        assert isinstance(result, Rejection), unsafe
        assert result.reason == "path_unsafe"
    assert local_path(folder, "in.png") == (folder / "0.png").resolve()


def test_files_above_the_limit_are_not_read(tmp_path: Path) -> None:
    """A file may have as many bytes as the limit says."""
    (tmp_path / "fits").write_bytes(b"four")
    (tmp_path / "large").write_bytes(b"fives")
    found = find(str(tmp_path), ["fits", "large"], tmp_path)
    assert found[0] == (tmp_path / "fits").resolve()
    assert found[1] == Rejection(
        reason="image_too_large", message="5 bytes, data.max_picture_mib allows 4"
    )


def test_pictures_of_an_object_store_are_copied(tmp_path: Path, s3_store: str) -> None:
    """Objects are copied to scratch; absent, large and unsafe ones are told apart."""
    folder = location(s3_store)
    for name, data in {"a b.png": b"four", "empty": b"", "large": b"fives"}.items():
        (folder / name).write_bytes(data)
    found = find(s3_store, ["a b.png", "empty", "large", "none", "../x", "/x"], tmp_path)
    fates = [
        one.reason if isinstance(one, Rejection) else one.read_bytes() for one in found.values()
    ]
    assert fates == [
        b"four", b"", "image_too_large", "file_missing", "path_unsafe", "path_unsafe",
    ]  # fmt: skip
