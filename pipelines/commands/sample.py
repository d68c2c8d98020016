"""`ediffi sample`: pictures from an ensemble directory, without Ray or MLflow."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import yaml
from pydantic import ValidationError

from pipelines.commands.options import json_option
from pipelines.errors import UserError
from pipelines.recipe_file import parse_value
from pipelines.recipe_sections.sampling import Enlarging, SamplerSettings

if TYPE_CHECKING:
    from ediffi.generator import Generator
    from ediffi.painting import Painting
    from ediffi.sampling import SamplingConfig

SEEDS = (0, 1, 2, 3)

# Option, field of the recipe's section and of the library's config, what it says.
_SAMPLER_OPTIONS = (
    ("--sampler", "sampler", "how to go down the noise"),
    ("--steps", "num_steps", "steps"),
    ("--guidance", "guidance", "scale of classifier-free guidance; 1 turns it off"),
    ("--guidance-rescale", "guidance_rescale", "0 to 1: take back the contrast guidance adds"),
    ("--dynamic-threshold", "dynamic_threshold", "quantile of a picture's values such as 0.995"),
    ("--churn", "churn", "noise added on the way, of heun alone"),
    ("--churn-sigma-min", "churn_sigma_min", "lowest noise level at which churn acts"),
    ("--churn-sigma-max", "churn_sigma_max", "highest noise level at which churn acts"),
    ("--churn-noise", "churn_noise", "standard deviation of the added noise, times its due"),
    ("--sigma-min", "sigma_min", "last noise level at which a network is called"),
    ("--sigma-max", "sigma_max", "noise level at the start"),
    ("--rho", "rho", "exponent of the grid of noise levels"),
    ("--batch-pictures", "batch_pictures", "pictures drawn at once"),
)


def sample_options(verb: ArgumentParser) -> None:
    verb.add_argument("directory", type=Path, metavar="MODEL", help="an ensemble directory")
    verb.add_argument("--prompt", action="append", required=True, help="what to draw; repeatable")
    verb.add_argument(
        "--seed",
        type=int,
        action="append",
        help=f"every prompt is drawn with each ({' '.join(map(str, SEEDS))}); repeatable",
    )
    verb.add_argument("--out", type=Path, default=Path("samples"), help="directory for the PNGs")
    _steering_options(verb)
    _sampler_options(verb)
    _model_options(verb)
    json_option(verb)


def _steering_options(verb: ArgumentParser) -> None:
    verb.add_argument("--style", type=Path, metavar="PICTURE", help="whose style to take")
    verb.add_argument(
        "--paint",
        type=Path,
        metavar="PAINTING",
        help="a PNG whose colours say where phrases belong, or a folder of masks",
    )
    verb.add_argument(
        "--phrase",
        dest="phrases",
        action="append",
        default=[],
        metavar="COLOUR=PHRASE",
        help="such as '#ff0000=a red circle': what a colour of the painting stands for; repeatable",
    )
    verb.add_argument(
        "--strength",
        dest="strengths",
        action="append",
        default=[],
        metavar="[COLOUR=]NUMBER",
        help="how strongly phrases are painted, all of them or one; repeatable",
    )
    verb.add_argument(
        "--drop-stream",
        dest="dropped_streams",
        action="append",
        default=[],
        metavar="STREAM",
        help="what the networks are not told, such as t5; repeatable",
    )


def _sampler_options(verb: ArgumentParser) -> None:
    for option, field, help_text in _SAMPLER_OPTIONS:
        default = SamplerSettings.model_fields[field].default
        choices = get_args(SamplerSettings.model_fields[field].annotation)
        verb.add_argument(
            option,
            dest=field,
            type=type(default),
            default=default,
            choices=choices if field == "sampler" else None,
            metavar=None if field == "sampler" else "N",
            help=f"{help_text} ({default})",
        )
    verb.add_argument(
        "--guidance-interval",
        nargs=2,
        type=float,
        default=SamplerSettings.model_fields["guidance_interval"].default,
        metavar=("LOW", "HIGH"),
        help="noise levels between which guidance acts (0 inf)",
    )
    verb.add_argument(
        "--image-px",
        type=int,
        metavar="N",
        help="size to stop at, where the ensemble has super-resolution models (the largest)",
    )
    verb.add_argument(
        "--enlarging",
        action="append",
        default=[],
        metavar="[NAME.]FIELD=VALUE",
        help="how super-resolution models sample, such as num_steps=5, all of them or one; fields "
        "as in a recipe's sample.enlarging; repeatable",
    )


def _model_options(verb: ArgumentParser) -> None:
    verb.add_argument(
        "--model",
        choices=("ensemble", "base"),
        default="ensemble",
        help="the experts, or the base that they come from (ensemble)",
    )
    verb.add_argument(
        "--missing-experts",
        choices=("error", "base"),
        default="error",
        help="base: it stands in for experts whose files are absent (error)",
    )
    verb.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")
    verb.add_argument(
        "--precision",
        choices=("fp32", "bf16"),
        default="fp32",
        help="of the networks' arithmetic (fp32)",
    )
    verb.add_argument(
        "--load",
        choices=("eager", "lazy"),
        default="eager",
        help="lazy: experts when first called (eager)",
    )
    verb.add_argument(
        "--device-gib",
        type=float,
        default=0.0,
        metavar="GIB",
        help="of experts' weights on the device at most; 0: no limit (0)",
    )
    verb.add_argument(
        "--offload", choices=("cpu", "disk"), default="cpu", help="where the others wait (cpu)"
    )


def sample(options: Namespace) -> None:
    """Draw every prompt with every seed; print where each picture lies.

    Raises:
        UserError: the directory holds no whole ensemble, or does not have what is asked of it.
    """
    seeds = options.seed or SEEDS
    pairs = [(prompt, seed) for prompt in options.prompt for seed in seeds]
    try:
        painting = _painting(options)
        generator = _load(options)
        pictures = generator.generate(
            [prompt for prompt, _ in pairs],
            seeds=[seed for _, seed in pairs],
            style=options.style,
            painting=painting,
            image_px=options.image_px,
            config=_config(options),
            enlarging=enlarging_configs(
                options.enlarging, [one.name for one in generator.enlargers]
            ),
            dropped_streams=options.dropped_streams,
            model=options.model,
            progress=lambda num: print(f"{num} of {len(pairs)} pictures", file=sys.stderr),
        )
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error
    options.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for index, (picture, (prompt, seed)) in enumerate(zip(pictures, pairs, strict=True)):
        path = options.out / f"{index // len(seeds):03d}-seed{seed}.png"
        picture.save(path)
        rows.append({"path": str(path), "prompt": prompt, "seed": seed, "image_px": picture.width})
    if options.json:
        print(json.dumps({"pictures": rows, "stand_ins": list(generator.ensemble.stand_ins)}))
        return
    for row in rows:
        print(row["path"])


def _load(options: Namespace) -> Generator:
    import ediffi
    from ediffi.residency import Residency

    return ediffi.load(
        options.directory,
        device=options.device,
        residency=Residency(
            load=options.load, device_gib=options.device_gib, offload=options.offload
        ),
        missing_experts=options.missing_experts,
        precision=options.precision,
    )


def _config(options: Namespace) -> SamplingConfig:
    from ediffi.sampling import SamplingConfig

    fields = {field: getattr(options, field) for _, field, _ in _SAMPLER_OPTIONS}
    return SamplingConfig(**fields, guidance_interval=tuple(options.guidance_interval))


def _painting(options: Namespace) -> Painting | None:
    from pipelines.paintings import read_painting

    if options.paint is None:
        if options.phrases or options.strengths:
            raise UserError("--phrase and --strength need --paint PAINTING: what do they paint?")
        return None
    phrases = _by_colour("--phrase", options.phrases)
    general = [text for text in options.strengths if "=" not in text]
    if len(general) > 1:
        raise UserError(
            f"--strength for all phrases must be given once, got {' and '.join(general)}"
        )
    strengths = dict.fromkeys(phrases, general[0]) if general else {}
    strengths |= _by_colour("--strength", [text for text in options.strengths if "=" in text])
    return read_painting(
        options.paint, phrases, {colour: _number(text) for colour, text in strengths.items()}
    )


def _by_colour(option: str, texts: Sequence[str]) -> dict[str, str]:
    """What is said of each colour."""
    said: dict[str, str] = {}
    for text in texts:
        colour, equals, value = text.partition("=")
        if not (equals and value):
            raise UserError(f"{option} must read '#rrggbb=...', got {text!r}")
        if colour in said:
            raise UserError(f"{option} {text}: {colour} stands twice")
        said[colour] = value
    return said


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise UserError(f"--strength must be a number, got {text!r}") from error


def enlarging_configs(texts: Sequence[str], names: Sequence[str]) -> dict[str, SamplingConfig]:
    """How each super-resolution model samples, from `--enlarging` options.

    Args:
        texts: `num_steps=5` for all models, `sr256.num_steps=5` for one, whose word counts.
        names: of the cascade's models.

    Raises:
        UserError: an option is not written so, or names no model, no field or an unfit value.
    """

    said: dict[str, dict[str, Any]] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        name, _, field = key.rpartition(".")
        if not (equals and field) or (name and name not in names):
            raise UserError(
                f"--enlarging must read [NAME.]FIELD=VALUE, NAME one of this ensemble's "
                f"super-resolution models ({', '.join(names) or 'none'}), got {text!r}"
            )
        try:
            said.setdefault(name, {})[field] = parse_value(value)
        except yaml.YAMLError as error:
            raise UserError(f"--enlarging {text}: {error}") from error
    try:
        _section(said.get("", {}))  # also where there is no model that it would hold for
        sections = {name: _section(said.get("", {}) | said.get(name, {})) for name in names}
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()]
        raise UserError("--enlarging " + "; ".join(problems)) from error
    return {name: section.config() for name, section in sections.items()}


def _section(fields: Mapping[str, Any]) -> Enlarging:
    return Enlarging.model_validate(fields)
