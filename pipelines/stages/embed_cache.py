"""Use an embedding cache that was made elsewhere, as it lies there: `cache:` of an encoder.

No shard is copied. Before a cache is believed, its `encoder.json` must say what the recipe asks,
field by field, and every image shard must have a cache shard of the same name that was made from
the same keys and captions (or pictures), and whose files are those of its receipt.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pipelines.errors import UserError
from pipelines.recipe import Encoder
from pipelines.stage import File, Json, Manifest, Outcome, Receipt, Unit, Workspace
from pipelines.stages.embed import asked_identity, digest_kind
from pipelines.stages.embed_budget import check_receipts
from pipelines.stages.inputs import EMBED_PREFIX, NULL_UNIT, image_shards, without
from pipelines.store.fingerprint import file_sha256, unit_key
from pipelines.store.location import location

_FROM_FITTING = ("weights", "preprocessing")  # what a recipe with fitted weights cannot know


@dataclass(frozen=True, kw_only=True)
class AdoptCache:
    """Take over one encoder's finished cache. A unit is one shard; `null` is the empty caption."""

    encoder_name: str
    encoder: Encoder
    version: ClassVar[int] = 1
    needs: ClassVar[tuple[str, ...]] = ("ingest",)
    gang: ClassVar[bool] = False

    @property
    def name(self) -> str:
        return EMBED_PREFIX + self.encoder_name

    def identity(self) -> Json:
        """What the cache was made with and what it holds, wherever it lies.

        Raises:
            CacheMismatch: it was made with another encoder than the recipe asks for.
            ValueError: there is no finished cache at that place.
        """
        from ediffi.encoding.encoder_identity import check_identity, read_identity

        contents = self._cache().contents
        found, asked = read_identity(self.encoder.cache), asked_identity(self.encoder)
        skipped = _FROM_FITTING if self.encoder.is_fitted else ()
        where = f"{self._setting} {self.encoder.cache}"
        check_identity(without(found, skipped), without(asked, skipped), where)
        return {"encoder": found, "contents": contents}

    def plan(self, inputs: Mapping[str, Manifest]) -> Iterator[Unit]:
        """Pair every image shard with its cache shard.

        Raises:
            UserError: an image shard has no cache shard, or one made from other samples.
        """
        kind = digest_kind(self.encoder)
        settings = {"version": self.version, "encoder": self.identity()["encoder"]}
        made_from: dict[str, str] = {}  # unit -> digest of the samples; a few bytes a shard
        seals: dict[str, str] = {}
        for receipt in self._cache().receipts:
            made_from[receipt.unit] = receipt.facts.get("digests", {}).get(kind, "")
            seals[receipt.unit] = _seal(receipt)
        yield self._unit(NULL_UNIT, settings, seals)
        for image in image_shards(inputs["ingest"]):
            wanted = image.facts["digests"][kind]
            if image.unit in seals and made_from[image.unit] != wanted:
                raise UserError(
                    f"{self._setting}: the {kind} of {image.facts['shard']} must be those the "
                    f"cache was made from ({made_from[image.unit][:16]}...), found "
                    f"{wanted[:16]}...: embed these shards anew, or use the data of the cache"
                )
            yield self._unit(image.unit, settings, seals)

    def run(self, unit: Unit, workspace: Workspace) -> Outcome:
        """Verify one shard: its contents where they lie on a file system, else its sizes.

        What comes over the network is verified when a reader fetches it.

        Raises:
            UserError: a file is absent, or not the recorded one.
        """
        cache = self._cache()
        receipt = cache.receipt(unit.id)
        if _seal(receipt) != unit.arguments["seal"]:
            raise UserError(
                f"{self._setting}: {unit.id} changed while it was taken over; run again"
            )
        for file in receipt.files:
            self._check_file(cache, file)
        files = [
            File(path=cache.location(file), sha256=file.sha256, num_bytes=file.num_bytes)
            for file in receipt.files
        ]
        is_null = unit.id == NULL_UNIT
        if is_null:  # small, and looked for by name
            for file in receipt.files:
                (workspace.scratch / file.path).write_bytes(cache.path(file).read_bytes())
        return Outcome(
            files=[file.path for file in receipt.files] if is_null else (),
            adopted=() if is_null else files,
            num_in=receipt.num_in,
            num_out=receipt.num_out,
            rejects=receipt.rejects,
            flagged=receipt.flagged,
            facts=receipt.facts,
        )

    def check(self, receipts: Iterable[Receipt]) -> None:
        """Judge what the cache left out by this recipe's own budget. Raises StageFailed."""
        check_receipts(receipts, self.encoder_name, self.encoder)

    @property
    def _setting(self) -> str:
        return f"encoders.{self.encoder_name}.cache"

    def _cache(self) -> Manifest:
        try:
            return Manifest.load(location(self.encoder.cache))
        except FileNotFoundError as error:
            raise ValueError(
                f"{self._setting}: must be the folder of a finished embed stage, found no "
                f"manifest at {self.encoder.cache}: name the folder with its fingerprint, such "
                f"as STORE/{self.name}/0123456789abcdef, and finish that stage"
            ) from error

    def _unit(self, unit: str, settings: Json, seals: Mapping[str, str]) -> Unit:
        if unit not in seals:
            raise UserError(
                f"{self._setting}: {self.encoder.cache} holds nothing for {unit!r}: it was made "
                "from other shards; embed anew, or use the data of the cache"
            )
        seal = seals[unit]
        return Unit(id=unit, key=unit_key(settings, files=seal), arguments={"seal": seal})

    def _check_file(self, cache: Manifest, file: File) -> None:
        place = cache.path(file)
        try:
            num_bytes = place.stat().st_size
        except FileNotFoundError as error:
            raise UserError(
                f"{self._setting}: {place} is recorded there but absent; bring it back, or "
                "embed anew"
            ) from error
        if num_bytes != file.num_bytes:
            self._refuse(place, f"{file.num_bytes} bytes", f"{num_bytes} bytes")
        if isinstance(place, Path) and (sha256 := file_sha256(place)) != file.sha256:
            self._refuse(place, f"sha256 {file.sha256}", sha256)

    def _refuse(self, place: object, required: str, found: str) -> None:
        raise UserError(
            f"{self._setting}: {place} must have the recorded {required}, found {found}: it is "
            "damaged or was replaced; bring back the recorded file, or embed anew"
        )


def _seal(receipt: Receipt) -> str:
    """Stands for the bytes of all files of a unit."""
    return hashlib.sha256("".join(file.sha256 for file in receipt.files).encode()).hexdigest()[:32]
