"""Judging samples of tars made elsewhere: fit for later stages, to be mended, or why not.

Sizes are looked at before anything is read, and pixels counted before anything is decoded. What a
member holds is never executed: pickles in any wrapping are left out, unread.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any

from pipelines.stages.ingestion.picture_files import too_large
from pipelines.stages.ingestion.rejects import Rejection
from pipelines.stages.ingestion.source_list import caption_length, is_safe_key

if TYPE_CHECKING:
    from ediffi.storage.tar_index import MappedTar, Members

# Last suffixes of formats whose usual readers unpickle.
PICKLED = frozenset({"pkl", "pickle", "pyd", "pth", "pt", "ckpt", "joblib", "dill"})
MEMBER_UNSAFE = "member_unsafe:dropped"

_MAX_ABOUT_BYTES = 16 << 20  # of a JSON member that is read for its caption
_MAX_CHARACTER_BYTES = 4  # in UTF-8
_MAX_NAME_BYTES = 100  # of a member in a tar of ours
_ARRAY_HEADER_BYTES = 1 << 16  # more than numpy's own limit


@dataclass(frozen=True, kw_only=True)
class SampleLimits:
    """What a sample may be, from the recipe's `data` section."""

    max_picture_bytes: int
    max_pixels: int
    max_caption_characters: int


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A sample that is fit, once mended: members left out, and a caption if it lacks its own."""

    picture: bytes
    caption: bytes
    has_caption_member: bool
    dropped: Mapping[str, Rejection]  # extension -> why this member is left out

    @property
    def is_sound(self) -> bool:
        return self.has_caption_member and not self.dropped


def judge(tar: MappedTar, key: str, members: Members, limits: SampleLimits) -> Judged | Rejection:
    """Look at one sample: its key, its caption, its picture, then at all that comes with them."""
    from ediffi.shards import ImageError, decode_image
    from ediffi.storage.shard_format import IMAGE_EXTENSIONS

    if not is_safe_key(key):
        return Rejection(reason="key_invalid", message=f"key {key!r}")
    picture_span = next((members[name] for name in IMAGE_EXTENSIONS if name in members), None)
    if picture_span is None:
        return Rejection(reason="image_missing", message=f"members: {', '.join(members)}")
    caption = _caption(tar, members, limits.max_caption_characters)
    if isinstance(caption, Rejection):
        return caption
    if picture_span.num_bytes > limits.max_picture_bytes:
        return too_large(picture_span.num_bytes, limits.max_picture_bytes)
    picture = tar.read(picture_span)
    try:
        decode_image(picture, max_pixels=limits.max_pixels)
    except ImageError as error:
        return Rejection.of_image(error)
    return Judged(
        picture=picture,
        caption=caption,
        has_caption_member="txt" in members,
        dropped=_unsafe_members(tar, members),
    )


def is_namable(key: str, extension: str) -> bool:
    """Whether a member's name can be written so that every reader finds it again."""
    is_word = bool(extension) and not extension.startswith("_") and "\0" not in extension
    return is_word and len(f"{key}.{extension}".encode()) <= _MAX_NAME_BYTES


def _caption(tar: MappedTar, members: Members, max_characters: int) -> bytes | Rejection:
    """The caption as UTF-8, from the `.txt` member or the `caption` of the `.json` one."""
    span = members.get("txt")
    if span is not None and span.num_bytes > max_characters * _MAX_CHARACTER_BYTES:
        problem = (
            f"{span.num_bytes} bytes, data.max_caption_characters allows {max_characters} "
            "characters"
        )
        return Rejection(reason="caption_too_long", message=problem)
    try:
        caption = tar.read(span).decode() if span is not None else _json_caption(tar, members)
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, nested without end
        return Rejection(reason="caption_invalid", message=str(error))
    if caption is None:
        return Rejection(reason="caption_missing", message="neither .txt nor .json has it")
    if "\0" in caption:
        return Rejection(reason="caption_invalid", message="a NUL character in it")
    if not caption.strip():
        return Rejection(reason="caption_empty")
    return caption_length(len(caption), max_characters) or caption.encode()


def _json_caption(tar: MappedTar, members: Members) -> str | None:
    span = members.get("json")
    if span is None:
        return None
    if span.num_bytes > _MAX_ABOUT_BYTES:
        raise ValueError(f"a JSON member of {span.num_bytes} bytes, at most {_MAX_ABOUT_BYTES}")
    about = json.loads(tar.read(span))
    caption = about.get("caption") if isinstance(about, dict) else None
    return caption if isinstance(caption, str) else None


# -- members that a reader might execute ----------------------------------------------------------


def _unsafe_members(tar: MappedTar, members: Members) -> dict[str, Rejection]:
    problems = {name: _danger(tar, name, span) for name, span in members.items()}
    return {
        name: Rejection(reason=MEMBER_UNSAFE, message=f"member .{name}: {problem}")
        for name, problem in problems.items()
        if problem
    }


def _danger(tar: MappedTar, extension: str, span: Any) -> str:
    """Why a usual reader of this member might run code that it holds; "" if none would."""
    suffix = extension.rpartition(".")[2]
    if suffix in PICKLED:
        return "a pickle, which runs code when it is read"
    if suffix == "npy":
        head = tar.read(span._replace(num_bytes=min(span.num_bytes, _ARRAY_HEADER_BYTES)))
        return _array_danger(head)
    if suffix == "npz":
        return _archive_danger(tar.read(span))
    return ""


def _array_danger(head: bytes) -> str:
    """Read the header of a `.npy`; the array itself is left alone."""
    from numpy.lib import format as npy

    stream = BytesIO(head)
    try:
        version = npy.read_magic(stream)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        dtype = read(stream)[2]
    except Exception as error:  # headers of strangers fail in every way; none is executed
        return f"not a readable array: {error}"
    return "an array of pickled objects" if dtype.hasobject else ""


def _archive_danger(data: bytes) -> str:
    try:
        with zipfile.ZipFile(BytesIO(data)) as archive:
            for name in archive.namelist():
                with archive.open(name) as stream:
                    if problem := _array_danger(stream.read(_ARRAY_HEADER_BYTES)):
                        return f"{name}: {problem}"
    except Exception as error:  # as above
        return f"not a readable archive of arrays: {error}"
    return ""
