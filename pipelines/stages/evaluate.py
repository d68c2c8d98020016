"""Measure base and ensemble on what training never saw.

Loss by noise level on paired noise, Fréchet and kernel distance of the drawn pictures from the
real ones, and whether the pictures show what their captions say.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, ClassVar

from pipelines.recipe import ClipFeatures, Recipe
from pipelines.stage import Json, Manifest, Outcome, Unit, Workspace
from pipelines.stages.alignment import Alignment, clip_alignment, shapes_alignment
from pipelines.stages.assemble import ensemble_path
from pipelines.stages.inputs import (
    encoder_config,
    image_shards,
    joined_shards,
    shard_file,
)
from pipelines.stages.sample import MODELS, PROMPTS_UNIT

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from ediffi.conditioning import Conditioning
    from ediffi.encoding.encoder_weights import EncoderConfig
    from ediffi.generator import Generator
    from ediffi.loss import BinLoss
    from ediffi.metrics import FeatureExtractor


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """One unit: the report."""

    recipe: Recipe
    embeds: tuple[str, ...]
    name: ClassVar[str] = "evaluate"
    version: ClassVar[int] = 2  # 2: losses on the draws that training is watched by, so named
    gang: ClassVar[bool] = False

    @property
    def needs(self) -> tuple[str, ...]:
        fitted = ("clip_fit",) if self.recipe.clip_fit is not None else ()
        return ("assemble", "sample", "ingest", *fitted, *self.embeds)

    def identity(self) -> Json:
        config = self.recipe.evaluate
        identity = {**config.model_dump(mode="json"), "seed": self.recipe.seed}
        if not isinstance(config.features, ClipFeatures):
            from ediffi.metrics import extractor_identity

            identity["features_identity"] = extractor_identity(config.features.model_dump())
        return identity

    def plan(self, inputs: Mapping[str, Manifest]) -> list[Unit]:
        return [Unit(id="report")]

    def run(self, unit: Unit, workspace: Workspace) -> Outcome:
        import ediffi

        generator = ediffi.load(
            ensemble_path(workspace.inputs["assemble"]), device=workspace.device
        )
        losses = self._losses(generator, workspace.inputs)
        real, real_captions = self._read(_held_out_paths(workspace.inputs["ingest"]))
        report: dict[str, Json] = {
            "loss": {model: [asdict(one) for one in bins] for model, bins in losses.items()},
            "num_real": len(real),
            "alignment": {"kind": self.recipe.evaluate.alignment},
            "distance": {},
        }
        extract = self._extractor(workspace)
        align = self._alignment(workspace)
        report["alignment"]["real"] = align(real, real_captions).to_json(self.recipe.seed)
        for model in MODELS:
            pictures, captions = self._read(_drawn_paths(workspace, model))
            report["num_drawn"] = len(pictures)
            report["alignment"][model] = align(pictures, captions).to_json(self.recipe.seed)
            report["distance"][model] = _distances(extract, pictures, real)
        report["distance"]["train"] = self._floor(extract, real, workspace.inputs["ingest"])
        _write_report(report, losses, workspace.scratch)
        return Outcome(
            files=["report.json", "loss_by_sigma.png"],
            num_in=len(real),
            num_out=report["num_drawn"],
            facts={
                "metrics": _metrics(report, losses),
                "artifacts": ["report.json", "loss_by_sigma.png"],
            },
        )

    def _losses(
        self, generator: Generator, inputs: Mapping[str, Manifest]
    ) -> dict[str, list[BinLoss]]:
        """Loss by noise bin of each model: same samples, same sigmas, same noise."""
        from ediffi.loss import HELD_OUT_SEED, loss_by_sigma_bin

        config = self.recipe.evaluate
        batches = list(self._held_out_batches(generator, inputs))
        return {
            model: loss_by_sigma_bin(
                generator.denoiser(model),
                itertools.cycle(batches),
                distribution=generator.info.distribution,
                preconditioning=generator.info.preconditioning,
                num_bins=config.num_bins,
                draws_per_bin=config.draws_per_bin,
                seed=HELD_OUT_SEED,
            )
            for model in MODELS
        }

    def _held_out_batches(
        self, generator: Generator, inputs: Mapping[str, Manifest]
    ) -> Iterator[tuple[Tensor, Conditioning]]:
        """Pictures in [-1, 1] with their cached conditioning, at most as many as are drawn."""
        import torch

        from ediffi.conditioning import collate
        from ediffi.shards import JoinedShards

        shards = joined_shards(inputs, "held_out")
        samples = JoinedShards(
            shards,
            image_px=self.recipe.base_px,
            resize=self.recipe.data.resize,
            missing=self.recipe.missing_embeddings,
        )
        num = min(len(samples), self.recipe.evaluate.draws_per_bin)
        size = self.recipe.evaluate.batch_images
        for start in range(0, num, size):
            batch = [samples[index] for index in range(start, min(start + size, num))]
            images = torch.stack([sample.image for sample in batch]).float() / 127.5 - 1
            streams = [sample.streams for sample in batch]
            conditioning = collate(streams, generator.info.network.streams)
            yield images.to(generator.device), conditioning.to(generator.device, torch.float32)
        samples.close()

    def _extractor(self, workspace: Workspace) -> FeatureExtractor:
        from ediffi.metrics import feature_extractor

        features = self.recipe.evaluate.features
        if isinstance(features, ClipFeatures):
            encoder = encoder_config(self.recipe.encoders[features.encoder], workspace.inputs)
            config = {"kind": "clip", "encoder": encoder}
        else:
            config = features.model_dump()
        return feature_extractor(config, device=workspace.device)

    def _alignment(self, workspace: Workspace) -> Alignment:
        if self.recipe.evaluate.alignment == "shapes":
            return shapes_alignment()
        inputs = workspace.inputs
        text = encoder_config(self.recipe.encoders[self.recipe.evaluate.text_encoder], inputs)
        return clip_alignment(text, self._clip_image_config(inputs), workspace.device)

    def _clip_image_config(self, inputs: Mapping[str, Manifest]) -> EncoderConfig:
        text = self.recipe.encoders[self.recipe.evaluate.text_encoder]
        twin = next(
            encoder
            for encoder in self.recipe.encoders.values()
            if encoder.family == "open_clip_image"
            and (encoder.weights, encoder.model) == (text.weights, text.model)
        )
        return encoder_config(twin, inputs)

    def _floor(self, extract: FeatureExtractor, real: Tensor, ingest: Manifest) -> Json:
        """Distance of as many training pictures from the held-out ones: what perfection gives."""
        paths = (ingest.local_path(shard_file(one)) for one in image_shards(ingest, "train"))
        train, _ = self._read(paths, limit=len(real))
        return _distances(extract, train, real)

    def _read(self, paths: Iterator[Path], limit: int | None = None) -> tuple[Tensor, list[str]]:
        """Pictures, uint8 (B, 3, H, W), and captions of whole shards, or the first `limit`."""
        import torch

        from ediffi.shards import caption_of, decode_image, fit_image, picture_of, read_shard

        image_px, resize = self.recipe.base_px, self.recipe.data.resize
        samples = (members for path in paths for _, members in read_shard(path))
        pictures, captions = [], []
        for members in itertools.islice(samples, limit):
            pixels = fit_image(decode_image(picture_of(members)), image_px, resize)
            pictures.append(torch.from_numpy(pixels).permute(2, 0, 1))
            captions.append(caption_of(members))
        return torch.stack(pictures), captions


def _held_out_paths(ingest: Manifest) -> Iterator[Path]:
    return (ingest.local_path(shard_file(receipt)) for receipt in image_shards(ingest, "held_out"))


def _drawn_paths(workspace: Workspace, model: str) -> Iterator[Path]:
    sample = workspace.inputs["sample"]
    for receipt in sample.receipts:
        if receipt.unit != PROMPTS_UNIT:
            name = f"{receipt.unit}-{model}.tar"
            yield sample.local_path(next(file for file in receipt.files if file.path == name))


def _distances(extract: FeatureExtractor, pictures: Tensor, real: Tensor) -> Json:
    from ediffi.metrics import frechet_distance, kernel_distance

    drawn_ND, real_ND = extract(pictures).double().numpy(), extract(real).double().numpy()
    return {
        "frechet": frechet_distance(drawn_ND, real_ND),
        "kernel": kernel_distance(drawn_ND, real_ND),
    }


def _metrics(report: Json, losses: Mapping[str, list[BinLoss]]) -> dict[str, float]:
    """The report's figures under a few stable names, for MLflow and `ediffi compare`."""
    from ediffi.loss import held_out_metrics

    metrics = {}
    for model in MODELS:
        for name, value in held_out_metrics(losses[model]).items():
            metrics[f"{model}/{name}"] = value
        for name, value in report["distance"][model].items():
            metrics[f"{model}/{name}_distance"] = value
        metrics[f"{model}/text_alignment"] = report["alignment"][model]["score"]
    metrics["real/text_alignment"] = report["alignment"]["real"]["score"]
    metrics["train/frechet_distance"] = report["distance"]["train"]["frechet"]
    if "chance" in report["alignment"]["real"]:
        metrics["chance/text_alignment"] = report["alignment"]["real"]["chance"]
    return metrics


def _write_report(report: Json, losses: Mapping[str, list[BinLoss]], scratch: Path) -> None:
    (scratch / "report.json").write_text(json.dumps(report, indent=1, sort_keys=True) + "\n")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="noise bin, least noisy first", ylabel="held-out loss")
    for model, bins in losses.items():
        axes.errorbar(
            [one.index for one in bins],
            [one.mean for one in bins],
            yerr=[one.standard_error for one in bins],
            capsize=3,
            label=model,
        )
    axes.legend()
    # no software version or date in the file: equal results give equal bytes
    FigureCanvasAgg(figure).print_png(scratch / "loss_by_sigma.png", metadata={"Software": None})
