"""Text to pictures: an ensemble directory, its encoders, samplers and cascade behind one call.

    generator = ediffi.load("ediffi-store/assemble/.../ensemble")
    pictures = generator.generate(["a red circle on the left"], guidance=3.0)

A reference picture sets the style (paper section 5); a painting says which phrase belongs where
(`ediffi.painting`). Super-resolution models that lie in the directory enlarge what the base has
drawn, one after another (section 4).

Shape legend: B batch, C channels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Unpack, get_args

import torch
from torch import Tensor

from ediffi.cascade import enlarge, picture_sizes_px, read_cascade
from ediffi.conditioning import Conditioning
from ediffi.drawing_request import DrawingRequest, DrawOptions, Enlarger, Model, drawing_request
from ediffi.ensemble import ROUTE, Blend, Ensemble
from ediffi.ensemble_file import (
    EnsembleInfo,
    Missing,
    load_base,
    load_ensemble,
    read_ensemble_info,
)
from ediffi.painting import Painting
from ediffi.pictures import to_pil
from ediffi.preconditioning import DenoiserFn
from ediffi.prompts import PromptEncoders, Style, one_each
from ediffi.residency import HOLD_ALL, Residency
from ediffi.sampling import SamplingConfig, draw, to_uint8

if TYPE_CHECKING:
    from PIL import Image

Precision = Literal["fp32", "bf16"]


class Generator:
    """A loaded ensemble that turns prompts into pictures.

    Args:
        directory: an ensemble directory, as `save_ensemble` writes it. Weights of encoders that
            begin with `./` lie inside it.
        device: where the networks run.
        residency: when experts are loaded, and how many stay on the device; each model of a cascade
            by itself.
        missing_experts: `base` lets the base stand in for experts whose files are absent.
        blend: one expert a call, or the average of all.
        precision: `bf16` runs the networks under autocast, as training in bf16 does.

    Attributes:
        info: what `ensemble.json` says.
        ensemble: the base model's experts; its `calls` count network calls.
        enlargers: the cascade's super-resolution models in order of size; each is loaded when it is
            first needed.

    Raises:
        SnapshotError: the directory is incomplete or damaged; the message names the file.
        ValueError: an unknown precision, or a budget that holds not even one expert.
    """

    def __init__(
        self,
        directory: Path,
        *,
        device: str = "cpu",
        residency: Residency = HOLD_ALL,
        missing_experts: Missing = "error",
        blend: Blend = ROUTE,
        precision: Precision = "fp32",
    ) -> None:
        if precision not in get_args(Precision):
            raise ValueError(
                f"precision must be one of {', '.join(get_args(Precision))}, got {precision!r}"
            )
        self.directory, self.device, self.precision = directory, device, precision
        self._residency, self._missing, self._blend = residency, missing_experts, blend
        self.info: EnsembleInfo
        self.info, self.ensemble = self._load(directory)
        self.enlargers = self._read_enlargers()
        self._encoders = PromptEncoders(directory, self.info, device)
        self._enlarging: dict[Path, tuple[EnsembleInfo, Ensemble]] = {}

    def _load(self, directory: Path) -> tuple[EnsembleInfo, Ensemble]:
        return load_ensemble(
            directory,
            device=self.device,
            residency=self._residency,
            missing=self._missing,
            blend=self._blend,
        )

    def _read_enlargers(self) -> tuple[Enlarger, ...]:
        paths = {path.name: path for path in read_cascade(self.directory)}
        networks = {name: read_ensemble_info(path).network for name, path in paths.items()}
        sizes_px = picture_sizes_px(self.info.network, networks)
        return tuple(
            Enlarger(name=name, directory=paths[name], image_px=sizes_px[name]) for name in paths
        )

    @property
    def sizes_px(self) -> tuple[int, ...]:
        """Sides of the pictures that can be drawn: the base's, then the cascade's."""
        return (self.info.network.image_px, *(one.image_px for one in self.enlargers))

    def denoiser(self, model: Model = "ensemble") -> DenoiserFn:
        """The ensemble, or the base that its experts come from."""
        if model not in get_args(Model):
            raise ValueError(f"model must be one of {', '.join(get_args(Model))}, got {model!r}")
        return self._precise(self.ensemble if model == "ensemble" else self._base)

    @cached_property
    def _base(self) -> DenoiserFn:
        return load_base(self.directory).to(self.device)

    def _precise(self, denoiser: DenoiserFn) -> DenoiserFn:
        if self.precision == "fp32":
            return denoiser
        device_type = torch.device(self.device).type

        def in_bf16(x_BCHW: Tensor, sigma_B: Tensor, conditioning: Conditioning) -> Tensor:
            with torch.autocast(device_type, torch.bfloat16):
                return denoiser(x_BCHW, sigma_B, conditioning)

        return in_bf16

    def conditioning(
        self,
        prompts: Sequence[str],
        *,
        style: Style | Sequence[Style | None] | None = None,
        painting: Painting | Sequence[Painting | None] | None = None,
    ) -> Conditioning:
        """Encode prompts, reference pictures and paintings with the ensemble's own encoders.

        Image streams of prompts without a reference are zeroed, as training drops them.

        Returns:
            One entry a prompt, on the CPU, in the encoders' storage dtype.

        Raises:
            ValueError: a reference for an ensemble without an image stream, one that is no
                picture, or a painted phrase that its prompt lacks.
        """
        return self._encoders.conditioning(
            prompts,
            one_each("style", style, len(prompts)),
            one_each("painting", painting, len(prompts)),
        )

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        seeds: Sequence[int] | None = None,
        guidance: float | None = None,
        style: Style | Sequence[Style | None] | None = None,
        painting: Painting | Sequence[Painting | None] | None = None,
        image_px: int | None = None,
        config: SamplingConfig | None = None,
        enlarging: SamplingConfig | Mapping[str, SamplingConfig] | None = None,
        dropped_streams: Sequence[str] = (),
        model: Model = "ensemble",
        progress: Callable[[int], None] = lambda num_pictures: None,
    ) -> list[Image.Image]:
        """Draw one picture a prompt; a single prompt is drawn once for each seed.

        Args:
            prompts: what to draw.
            seeds: one a picture; a picture depends on its prompt, its seed and what else is said
                of it here, on nothing else in the batch beyond rounding. None: 0, 1, 2, ...
            guidance: scale of classifier-free guidance, in place of the config's; 1 turns it off.
                Enlarging has its own.
            style: the picture whose style to take, for all prompts or one for each.
            painting: which phrase belongs where, for all prompts or one for each. It steers the
                base alone: what is enlarged already has its layout.
            image_px: the size to stop at, one of `sizes_px`. None: the largest.
            config: how the base draws.
            enlarging: how super-resolution models draw, all of them or by name. None: as in the
                paper.
            dropped_streams: what no network is told, such as t5.
            model: the ensemble, or the base that its experts come from.
            progress: told the number of finished pictures after every batch.

        Returns:
            PIL pictures, in the order of the prompts or seeds.

        Raises:
            ValueError: numbers that do not match, or something the ensemble does not have.
        """
        pictures_BCHW = self.draw(
            prompts,
            seeds=seeds,
            guidance=guidance,
            style=style,
            painting=painting,
            image_px=image_px,
            config=config,
            enlarging=enlarging,
            dropped_streams=dropped_streams,
            model=model,
            progress=progress,
        )
        return to_pil(pictures_BCHW)

    def draw(self, prompts: str | Sequence[str], **options: Unpack[DrawOptions]) -> Tensor:
        """As `generate`, but the pictures come as uint8 (B, 3, H, W) on the CPU."""
        sizes = self.draw_sizes(prompts, **options)
        return sizes[max(sizes)]

    def draw_sizes(
        self, prompts: str | Sequence[str], **options: Unpack[DrawOptions]
    ) -> dict[int, Tensor]:
        """As `draw`, with what was enlarged on the way: pictures by their side in pixels."""
        request = drawing_request(
            prompts, options, enlargers=self.enlargers, base_px=self.info.network.image_px
        )
        denoiser = self.denoiser(options.get("model", "ensemble"))
        progress = options.get("progress", lambda num_pictures: None)
        drawn: dict[int, list[Tensor]] = {}
        for rows in request.batches():
            for pictures_BCHW in self._draw_batch(denoiser, request, rows):
                drawn.setdefault(pictures_BCHW.shape[-1], []).append(to_uint8(pictures_BCHW))
            progress(rows.stop)
        return {image_px: torch.cat(batches) for image_px, batches in drawn.items()}

    def _draw_batch(
        self, denoiser: DenoiserFn, request: DrawingRequest, rows: slice
    ) -> Iterator[Tensor]:
        """The base's pictures, then each size of the cascade; float32 (B, 3, H, W)."""
        seeds, network = request.seeds[rows], self.info.network
        conditioning = self._encoders.conditioning(
            request.prompts[rows], request.styles[rows], request.paintings[rows]
        )
        conditioning = conditioning.without(request.dropped_streams)
        conditioning = conditioning.to(self.device, torch.float32)
        pictures_BCHW = draw(
            denoiser,
            conditioning,
            seeds=seeds,
            shape_CHW=(network.image_channels, network.image_px, network.image_px),
            config=request.config,
            device=self.device,
        )
        yield pictures_BCHW
        unpainted = conditioning.without_paint()
        for index, (enlarger, config) in enumerate(request.enlarging):
            info, ensemble = self._enlarger(enlarger)
            pictures_BCHW = enlarge(
                self._precise(ensemble),
                info.network,
                pictures_BCHW,
                unpainted,
                seeds=seeds,
                stage=index + 1,
                config=config,
                device=self.device,
            )
            yield pictures_BCHW

    def _enlarger(self, enlarger: Enlarger) -> tuple[EnsembleInfo, Ensemble]:
        if enlarger.directory not in self._enlarging:
            self._enlarging[enlarger.directory] = self._load(enlarger.directory)
        return self._enlarging[enlarger.directory]
