"""Make one shard of an embedding cache: the tar of one encoder, from the tar of pictures.

Three things happen at once: threads decode (or the captions are tokenized), the encoder runs, and
a thread of its own packs what came out. Captions of the whole shard are sorted by length and
encoded in batches of equal token counts rather than equal numbers of samples; what was encoded out
of order waits in a spool, so that the tar has the order of the pictures. Which samples meet in a
batch follows from the shard's content alone: equal inputs give equal bytes.

In memory at any time are the token ids of one shard, CHUNK_CAPTIONS captions, at most
MAX_DECODED_BATCHES batches of decoded pictures, MAX_ENCODED_BATCHES encoded batches and SPOOL_BYTES
of the spool; the rest of it lies in a file beside the tar. The size of a shard does not matter.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from tempfile import SpooledTemporaryFile

import torch

from ediffi.encoders import Encoder, ImageEncoder, TextEncoder, token_batches
from ediffi.encoding.embed_report import Clock, EmbedReport, Tally
from ediffi.encoding.encoded_batch import EncodedBatch
from ediffi.pictures import ImageError, decode_image
from ediffi.storage.shard_format import IMAGE_EXTENSIONS, ShardWriter, encode_tensors
from ediffi.storage.tar_index import MappedTar, Members, ShardError

CHUNK_CAPTIONS = 1024
MAX_DECODED_BATCHES = 2
MAX_ENCODED_BATCHES = 3
SPOOL_BYTES = 256 << 20


def embed_shard(
    encoder: Encoder,
    source: Path,
    target: Path,
    *,
    max_pixels: int = 64_000_000,
    num_threads: int = 1,
) -> EmbedReport:
    """Encode every sample of a tar into a new tar with the same keys in the same order.

    Samples that cannot be encoded are left out and reported: `caption_empty`, `caption_too_long`
    (only where the encoder's `too_long` is reject), `image_truncated`, `image_bomb`,
    `image_undecodable`, and `not_finite` for NaN or inf in what the network gave.

    Args:
        max_pixels: of a picture, checked before it is decoded.
        num_threads: that decode pictures; has no influence on the result.

    Raises:
        ShardError: the tar is torn, or a sample lacks its picture or caption.
    """
    clock = Clock(encoder.device)
    with closing(MappedTar(source)) as tar:
        index = tar.index()
        tally = Tally(keys=list(index))
        with ShardWriter(target) as writer:
            if isinstance(encoder, TextEncoder):
                _embed_captions(encoder, tar, index, writer, tally, clock)
            else:
                assert isinstance(encoder, ImageEncoder)
                prepare = _Preparation(tar=tar, encoder=encoder, max_pixels=max_pixels)
                _embed_pictures(prepare, index, num_threads, writer, tally, clock)
    return tally.report(clock)


# -- captions --------------------------------------------------------------------------------------


def _embed_captions(
    encoder: TextEncoder,
    tar: MappedTar,
    index: Mapping[str, Members],
    writer: ShardWriter,
    tally: Tally,
    clock: Clock,
) -> None:
    """Longest captions first, so that a batch too large for the device fails at once."""
    with clock.waiting("decode_wait_s"):
        ids = dict(_tokenized(encoder, tar, index, tally))
    positions = list(ids)
    lengths = [encoder.stored_length(ids[position]) for position in positions]
    with _Spool(writer.path.parent) as spool:
        with _Packer(spool.write, tally, clock) as packer:
            for batch in token_batches(lengths, encoder.batch_tokens):
                chosen = [positions[i] for i in batch]
                clock.count_padding([lengths[i] for i in batch], [len(ids[p]) for p in chosen])
                with clock.encoding():
                    encoded = encoder.encode_ids([ids[position] for position in chosen]).to_cpu()
                packer.put(chosen, encoded)
        with clock.waiting("write_wait_s"):
            for position in positions:
                if position not in tally.reasons:
                    writer.write(tally.keys[position], {"safetensors": spool.read(position)})


def _tokenized(
    encoder: TextEncoder, tar: MappedTar, index: Mapping[str, Members], tally: Tally
) -> Iterator[tuple[int, list[int]]]:
    """Position in the shard and token ids of every caption that is to be encoded."""
    members = list(index.values())
    for start in range(0, len(members), CHUNK_CAPTIONS):
        chunk = range(start, min(start + CHUNK_CAPTIONS, len(members)))
        captions = {p: _caption(tar, tally.keys[p], members[p]) for p in chunk}
        for position in [p for p, caption in captions.items() if not caption.strip()]:
            tally.reject(position, "caption_empty")
            del captions[position]
        tokenized = encoder.tokenize(list(captions.values()))
        for position, ids, num_tokens in zip(captions, tokenized.ids, tokenized.num_tokens):
            if num_tokens > encoder.config.max_tokens:
                if encoder.config.too_long == "reject":
                    tally.reject(position, "caption_too_long")
                    continue
                tally.truncated.append(position)
            yield position, ids


def _caption(tar: MappedTar, key: str, members: Members) -> str:
    if "txt" not in members:
        raise ShardError(f"{tar.path}: sample {key!r} has no caption: needs a member {key}.txt")
    try:
        return tar.read(members["txt"]).decode()
    except UnicodeDecodeError as error:
        raise ShardError(f"{tar.path}: caption of {key!r} is not UTF-8") from error


class _Spool:
    """Samples packed out of order, to be read back in any."""

    def __init__(self, folder: Path) -> None:
        self._file = SpooledTemporaryFile(SPOOL_BYTES, dir=str(folder))  # noqa: SIM115
        self._spans: dict[int, tuple[int, int]] = {}
        self._end = 0

    def write(self, position: int, data: bytes) -> None:
        self._file.write(data)
        self._spans[position] = (self._end, len(data))
        self._end += len(data)

    def read(self, position: int) -> bytes:
        offset, num_bytes = self._spans[position]
        self._file.seek(offset)
        return self._file.read(num_bytes)

    def __enter__(self) -> _Spool:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


# -- pictures --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Preparation:
    """From a picture's bytes in the tar to the network's input; runs in threads."""

    tar: MappedTar
    encoder: ImageEncoder
    max_pixels: int

    def __call__(self, key: str, members: Members) -> torch.Tensor | ImageError:
        extension = next((e for e in IMAGE_EXTENSIONS if e in members), None)
        if extension is None:
            raise ShardError(
                f"{self.tar.path}: sample {key!r} has no image: needs one member of "
                f"{', '.join(IMAGE_EXTENSIONS)}, found {', '.join(members)}"
            )
        data = self.tar.read(members[extension])
        try:
            return self.encoder.prepare(decode_image(data, max_pixels=self.max_pixels))
        except ImageError as error:
            return error


def _embed_pictures(
    prepare: _Preparation,
    index: Mapping[str, Members],
    num_threads: int,
    writer: ShardWriter,
    tally: Tally,
    clock: Clock,
) -> None:
    """In the order of the tar: pictures are all of one size, so there is nothing to sort."""

    def write(position: int, data: bytes) -> None:
        writer.write(tally.keys[position], {"safetensors": data})

    def encode(batch: list[tuple[int, torch.Tensor]]) -> None:
        with clock.encoding():
            encoded = prepare.encoder.encode_pixels([x_CHW for _, x_CHW in batch]).to_cpu()
        packer.put([position for position, _ in batch], encoded)

    batch: list[tuple[int, torch.Tensor]] = []
    with _Packer(write, tally, clock) as packer:
        for position, prepared in _prepared(prepare, index, num_threads, clock):
            if isinstance(prepared, ImageError):
                tally.reject(position, prepared.reason)
                continue
            batch.append((position, prepared))
            if len(batch) == prepare.encoder.batch_images:
                encode(batch)
                batch = []
        if batch:
            encode(batch)


def _prepared(
    prepare: _Preparation, index: Mapping[str, Members], num_threads: int, clock: Clock
) -> Iterator[tuple[int, torch.Tensor | ImageError]]:
    """Pictures in order, decoded ahead by threads as far as the window allows."""
    window: deque[Future[torch.Tensor | ImageError]] = deque()
    samples = iter(index.items())
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="decode")
    try:
        for position in range(len(index)):
            while len(window) < MAX_DECODED_BATCHES * prepare.encoder.batch_images:
                if (sample := next(samples, None)) is None:
                    break
                window.append(pool.submit(prepare, *sample))
            with clock.waiting("decode_wait_s"):
                prepared = window.popleft().result()
            yield position, prepared
    finally:
        pool.shutdown(cancel_futures=True)


# -- packing ---------------------------------------------------------------------------------------


class _Packer:
    """Packs encoded batches in a thread; `put` waits while MAX_ENCODED_BATCHES are not packed."""

    def __init__(self, write: Callable[[int, bytes], None], tally: Tally, clock: Clock) -> None:
        self._write, self._tally, self._clock = write, tally, clock
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="pack")
        self._waiting: deque[Future[None]] = deque()

    def put(self, positions: Sequence[int], batch: EncodedBatch) -> None:
        while len(self._waiting) >= MAX_ENCODED_BATCHES:
            self._wait()
        self._waiting.append(self._pool.submit(self._pack, positions, batch))

    def _wait(self) -> None:
        with self._clock.waiting("write_wait_s"):
            self._waiting.popleft().result()

    def _pack(self, positions: Sequence[int], batch: EncodedBatch) -> None:
        batch.arrived()
        is_sound = self._tally.count(positions, batch)
        for position, sound, sample in zip(positions, is_sound, batch.samples()):
            if sound:
                self._write(position, encode_tensors(sample))

    def __enter__(self) -> _Packer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            while self._waiting and kind is None:
                self._wait()
        finally:
            self._pool.shutdown(cancel_futures=True)
