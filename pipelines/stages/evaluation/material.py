"""What every measurement has at hand: the generator, real and drawn pictures, judges.

All is made when it is first asked for: a unit loads only what it measures with.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pipelines.recipe import Recipe
from pipelines.recipe_sections.evaluation import ClipFeatures
from pipelines.stage import Json, Manifest, Workspace
from pipelines.stages.alignment import Alignment, clip_alignment, shapes_alignment
from pipelines.stages.assemble import ensemble_path
from pipelines.stages.inputs import encoder_config, image_shards, joined_shards, shard_file
from pipelines.stages.sample import held_out_receipts
from pipelines.stages.untrained_experts import missing_experts

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from ediffi.conditioning import Conditioning
    from ediffi.encoding.encoder_weights import EncoderConfig
    from ediffi.features import FeatureExtractor
    from ediffi.generator import Generator, Model


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a measurement found: its part of the report, and pictures it left in scratch."""

    document: Json
    pictures: tuple[str, ...] = ()
    num_in: int
    num_out: int


@dataclass(frozen=True)
class PictureSet:
    """Pictures, uint8 (N, 3, H, W), with the caption and the JSON of each sample."""

    pictures: Tensor
    captions: tuple[str, ...]
    samples: tuple[Json, ...]

    def __len__(self) -> int:
        return len(self.captions)


@dataclass(frozen=True)
class Material:
    """One unit's view of the recipe and of the stage's inputs."""

    recipe: Recipe
    workspace: Workspace

    @cached_property
    def generator(self) -> Generator:
        import ediffi

        return ediffi.load(
            ensemble_path(self.workspace.inputs["assemble"]),
            device=self.workspace.device,
            missing_experts=missing_experts(self.workspace.inputs["assemble"]),
        )

    @cached_property
    def held_out(self) -> PictureSet:
        """Every held-out picture."""
        return self.split("held_out")

    @cached_property
    def held_out_features(self) -> NDArray[np.float64]:
        return self.features(self.held_out.pictures)

    @cached_property
    def extract(self) -> FeatureExtractor:
        from ediffi.features import feature_extractor

        features = self.recipe.evaluate.features
        config: dict[str, Any] = features.model_dump()
        if isinstance(features, ClipFeatures):
            config["encoder"] = self._encoder_config(features.encoder)
        return feature_extractor(config, device=self.workspace.device)

    @cached_property
    def align(self) -> Alignment:
        if self.recipe.evaluate.alignment == "shapes":
            return shapes_alignment()
        text_name = self.recipe.evaluate.text_encoder
        text = self.recipe.encoders[text_name]
        image_name = next(
            name
            for name, encoder in self.recipe.encoders.items()
            if encoder.is_image and (encoder.weights, encoder.model) == (text.weights, text.model)
        )
        return clip_alignment(
            self._encoder_config(text_name),
            self._encoder_config(image_name),
            self.workspace.device,
        )

    def features(self, pictures: Tensor) -> NDArray[np.float64]:
        """Features (N, D) of pictures."""
        features: NDArray[np.float64] = self.extract(pictures).double().numpy()
        return features

    def split(self, split: str, limit: int | None = None) -> PictureSet:
        """The pictures of a split, or the first `limit` of them."""
        ingest = self.workspace.inputs["ingest"]
        paths = (ingest.local_path(shard_file(one)) for one in image_shards(ingest, split))
        return self._read(paths, limit)

    def drawn(self, model: Model) -> PictureSet:
        """What `sample` has drawn for held-out captions with one model."""
        return self._read(_drawn_paths(self.workspace.inputs["sample"], model))

    def prompts(self, num: int) -> tuple[list[str], list[int]]:
        """Held-out captions to draw, each once before any comes again, and seeds, one each."""
        captions = list(dict.fromkeys(self.held_out.captions))
        return (
            [captions[index % len(captions)] for index in range(num)],
            [self.recipe.seed + index for index in range(num)],
        )

    def draw(self, prompts: Sequence[str], seeds: Sequence[int], **options: Any) -> Tensor:
        """Draw at the base's size as the recipe samples, uint8 (N, 3, H, W).

        Args:
            options: further arguments of `ediffi.generator.Generator.draw`.
        """
        return self.generator.draw(
            list(prompts),
            seeds=list(seeds),
            config=self.recipe.sample.config(),
            image_px=self.recipe.base_px,
            **options,
        )

    def held_out_batches(self, limit: int) -> Iterator[tuple[Tensor, Conditioning]]:
        """At most `limit` pictures in [-1, 1] with their cached conditioning, on the device."""
        import torch

        from ediffi.conditioning import collate
        from ediffi.shards import JoinedShards
        from ediffi.train.data import to_unit_range

        samples = JoinedShards(
            joined_shards(self.workspace.inputs, "held_out"),
            image_px=self.recipe.base_px,
            resize=self.recipe.data.resize,
            missing=self.recipe.missing_embeddings,
        )
        generator, size = self.generator, self.recipe.evaluate.batch_images
        num = min(len(samples), limit)
        for start in range(0, num, size):
            batch = [samples[index] for index in range(start, min(start + size, num))]
            images = to_unit_range(torch.stack([sample.image for sample in batch]))
            conditioning = collate(
                [sample.streams for sample in batch], generator.info.network.streams
            )
            yield images.to(generator.device), conditioning.to(generator.device, torch.float32)
        samples.close()

    def _encoder_config(self, name: str) -> EncoderConfig:
        return encoder_config(self.recipe.encoders[name], self.workspace.inputs)

    def _read(self, paths: Iterator[Path], limit: int | None = None) -> PictureSet:
        """Pictures of whole shards, brought to the base's size; those after `limit` are left."""
        import torch

        from ediffi.shards import caption_of, decode_image, fit_image, picture_of, read_shard

        image_px, resize = self.recipe.base_px, self.recipe.data.resize
        members_of_all = (members for path in paths for _, members in read_shard(path))
        pictures, captions, samples = [], [], []
        for members in itertools.islice(members_of_all, limit):
            pixels = fit_image(decode_image(picture_of(members)), image_px, resize)
            pictures.append(torch.from_numpy(pixels).permute(2, 0, 1))
            captions.append(caption_of(members))
            samples.append(json.loads(members.get("json", b"{}")))
        return PictureSet(torch.stack(pictures), tuple(captions), tuple(samples))


def _drawn_paths(sample: Manifest, model: str) -> Iterator[Path]:
    for receipt in held_out_receipts(sample):
        name = f"{receipt.unit}-{model}.tar"
        yield sample.local_path(next(file for file in receipt.files if file.path == name))
