"""The report's figures under a few stable names, for MLflow and for comparing runs."""

from __future__ import annotations

from pipelines.stage import Json
from pipelines.stages.sample import MODELS


def figures(report: Json) -> dict[str, float]:
    """Names such as `ensemble/frechet_distance`; sections that were not measured have none."""
    found = _of_models(report)
    for model, points in report.get("guidance_curve", {}).items():
        best = min(points, key=lambda point: point["distance"]["frechet"])
        found[f"guidance_curve/{model}/lowest_frechet_distance"] = best["distance"]["frechet"]
        found[f"guidance_curve/{model}/best_scale"] = best["scale"]
    for one in report.get("text_ablation", ()):
        name = "-".join(one["streams"])
        found[f"text_ablation/{name}/frechet_distance"] = one["distance"]["frechet"]
        found[f"text_ablation/{name}/text_alignment"] = one["alignment"]["score"]
    for name, shares in report.get("attention", {}).get("shares", {}).items():
        found[f"attention/{name}/lowest_sigma"] = shares[0]["value"]
        found[f"attention/{name}/highest_sigma"] = shares[-1]["value"]
    for how in ("painted", "unpainted"):
        for name, one in report.get("painting", {}).get(how, {}).items():
            found[f"painting/{how}/{name}"] = one["value"]
    for name in ("with_reference", "without_reference", "real_accuracy"):
        if "style" in report:
            found[f"style/{name}"] = report["style"][name]["value"]
    return found


def _of_models(report: Json) -> dict[str, float]:
    from ediffi.loss import BinLoss, held_out_metrics

    distance, alignment = report["distance"], report["alignment"]
    found: dict[str, float] = {}
    for model in MODELS:
        bins = [{**one, "sigma_max": float(one["sigma_max"])} for one in report["loss"][model]]
        losses = held_out_metrics([BinLoss(**one) for one in bins])
        found |= {f"{model}/{name}": value for name, value in losses.items()}
        for kind in ("frechet", "kernel"):
            found[f"{model}/{kind}_distance"] = distance[model][kind]
        found[f"{model}/text_alignment"] = alignment[model]["score"]
    found["real/text_alignment"] = alignment["real"]["score"]
    found["train/frechet_distance"] = distance["train"]["frechet"]
    if "chance" in alignment["real"]:
        found["chance/text_alignment"] = alignment["real"]["chance"]
    return found
