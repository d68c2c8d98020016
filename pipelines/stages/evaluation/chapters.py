"""The report's chapters, each from its part of the document and its pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from pipelines.stage import Json
from pipelines.stages.evaluation import (
    attention,
    drawings,
    guidance_curve,
    losses,
    painting,
    style,
    text_ablation,
)
from pipelines.stages.evaluation.page import Chapter, Figure, Table

Pictures = Mapping[str, bytes]  # PNGs by file name


def chapters(report: Json, pictures: Pictures) -> Iterator[Chapter]:
    """A chapter for everything that was measured, in the order of reading."""
    for name, make in _CHAPTERS.items():
        if name in report:
            yield make(report, pictures)


def grids_chapter(pictures: Pictures) -> Chapter:
    """What `sample` has drawn for people to look at."""
    figures = [Figure(png=png, caption=name) for name, png in pictures.items()]
    note = "Equal prompts and seeds for every model: columns differ by weights alone."
    return Chapter(title="Drawings", note=note, parts=figures)


def _pictures(report: Json, pictures: Pictures) -> Chapter:
    distance, alignment = report["distance"], report["alignment"]
    names = {
        "base": "base",
        "ensemble": "ensemble",
        drawings.DIFFERENCE: "ensemble - base",
        "train": "training pictures",
        "real": "held-out pictures",
    }
    rows = [
        [title, *_distance_cells(distance.get(name)), _score(alignment.get(name))]
        for name, title in names.items()
    ]
    header = ["", "Fréchet distance", "kernel distance", f"alignment ({alignment['kind']})"]
    note = (
        f"{report['num_drawn']} drawings a model against {report['num_real']} held-out pictures. "
        "Brackets: 95 % by resampling pictures; they do not cover another training seed. "
        "Distances compare within one kind of features and one number of pictures only. "
        "As many training pictures give the distance of perfect drawings."
    )
    figure = Figure(png=pictures[drawings.PICTURE], caption="drawings for held-out captions")
    return Chapter(
        title="Distance and alignment",
        note=note,
        parts=[Table(header=header, rows=rows), figure],
    )


def _losses(report: Json, pictures: Pictures) -> Chapter:
    by_model = report["loss"]
    rows = []
    for bins in zip(*by_model.values(), strict=True):
        low, high = float(bins[0]["sigma_min"]), float(bins[0]["sigma_max"])
        cells = [f"{one['mean']:.4f} ± {one['standard_error']:.4f}" for one in bins]
        rows.append([f"{low:.3g} to {high:.3g}", *cells])
    note = (
        "Mean loss on held-out samples by noise level, in bins of equal probability, with standard "
        "errors; the draws are the same for all models."
    )
    figure = Figure(png=pictures[losses.PICTURE], caption="held-out loss by noise bin")
    table = Table(header=["sigma", *by_model], rows=rows)
    return Chapter(title="Loss by noise level", note=note, parts=[table, figure])


def _guidance_curve(report: Json, pictures: Pictures) -> Chapter:
    rows = [
        [f"{model}, {point['scale']:g}", *_judged_cells(point)]
        for model, points in report["guidance_curve"].items()
        for point in points
    ]
    note = "Equal captions and seeds at every scale. Lower and further right is better."
    figure = Figure(png=pictures[guidance_curve.PICTURE], caption="points are labelled by scale")
    return Chapter(title="Guidance", note=note, parts=[_judged_table("model, scale", rows), figure])


def _text_ablation(report: Json, pictures: Pictures) -> Chapter:
    rows = [[" and ".join(one["streams"]), *_judged_cells(one)] for one in report["text_ablation"]]
    note = "One network told by one text encoder alone, the others dropped when drawing."
    figure = Figure(png=pictures[text_ablation.PICTURE], caption="equal captions and seeds")
    return Chapter(title="Text encoders", note=note, parts=[_judged_table("told by", rows), figure])


def _attention(report: Json, pictures: Pictures) -> Chapter:
    document = report["attention"]
    rows = [
        [f"{sigma:g}", *(_interval(shares[index]) for shares in document["shares"].values())]
        for index, sigma in enumerate(document["sigmas"])
    ]
    note = (
        f"Mean share of cross-attention by stream over {document['num']} held-out pictures, all "
        "layers, heads and pixels; null is the learned token that is always there."
    )
    figure = Figure(png=pictures[attention.PICTURE], caption="attention by noise level")
    table = Table(header=["sigma", *document["shares"]], rows=rows)
    return Chapter(title="Attention by noise level", note=note, parts=[table, figure])


def _painting(report: Json, pictures: Pictures) -> Chapter:
    document = report["painting"]
    names = ("painted", "unpainted", "painted_minus_unpainted")
    figures = {"share_inside": "inside its box", "iou": "IoU with its box", "seen": "seen at all"}
    rows = [
        [name.replace("_minus_", " - "), *(_interval(document[name][one]) for one in figures)]
        for name in names
    ]
    note = (
        f"What the detector ({document['detector']}) takes for a painted phrase, against the box "
        "it is painted into; equal seeds. No drawing fills a box, so IoU stays below 1."
    )
    figure = Figure(png=pictures[painting.PICTURE], caption="the painting, painted, unpainted")
    table = Table(header=["", *figures.values()], rows=rows)
    return Chapter(title="Painting with words", note=note, parts=[table, figure])


def _style(report: Json, pictures: Pictures) -> Chapter:
    document = report["style"]
    table = Table(
        header=["", "share"],
        rows=[
            ["drawings with a reference, of its style", _interval(document["with_reference"])],
            ["the same without a reference", _interval(document["without_reference"])],
            ["held-out pictures, recognised", _interval(document["real_accuracy"])],
            ["chance", f"{document['chance']:.3f}"],
        ],
    )
    confusion = document["confusion"]
    found = Table(
        header=["wanted, found", *confusion],
        rows=[[one, *(str(count) for count in row.values())] for one, row in confusion.items()],
    )
    note = (
        f"A classifier of {document['column']!r} on features of training pictures judges "
        f"{document['num']} drawings."
    )
    figure = Figure(png=pictures[style.PICTURE], caption="references, and drawings in their style")
    return Chapter(title="Style", note=note, parts=[table, found, figure])


# Of every part of the report that makes a chapter: what makes it.
_CHAPTERS: dict[str, Callable[[Json, Pictures], Chapter]] = {
    "distance": _pictures,
    "loss": _losses,
    "guidance_curve": _guidance_curve,
    "text_ablation": _text_ablation,
    "attention": _attention,
    "painting": _painting,
    "style": _style,
}


def _judged_table(title: str, rows: Sequence[Sequence[str]]) -> Table:
    header = [title, "Fréchet distance", "kernel distance", "alignment"]
    return Table(header=header, rows=rows)


def _judged_cells(judged: Json) -> list[str]:
    return [*_distance_cells(judged["distance"]), _score(judged["alignment"])]


def _distance_cells(distance: Json | None) -> list[str]:
    """Both distances, empty where there are none."""
    if distance is None:
        return ["", ""]
    return [
        _bracketed(distance[kind], distance[f"{kind}_low"], distance[f"{kind}_high"])
        for kind in ("frechet", "kernel")
    ]


def _score(alignment: Json | None) -> str:
    """An alignment, or a difference of two."""
    if alignment is None:
        return ""
    value = alignment["score"] if "score" in alignment else alignment["value"]
    return _bracketed(value, alignment["low"], alignment["high"])


def _interval(figure: Json) -> str:
    return _bracketed(figure["value"], figure["low"], figure["high"])


def _bracketed(value: float, low: float, high: float) -> str:
    return f"{value:.4g} [{low:.4g}, {high:.4g}]"
