"""Fréchet distance against alignment while guidance grows: the paper's curves of section 6."""

from __future__ import annotations

from pipelines.stages.evaluation.charts import Line, line_chart
from pipelines.stages.evaluation.drawings import judge
from pipelines.stages.evaluation.material import Material, Measured

PICTURE = "guidance_curve.png"


def measure_guidance_curve(material: Material) -> Measured:
    """Draw for equal captions and seeds at every scale, with each model, and judge."""
    config = material.recipe.evaluate.guidance_curve
    assert config is not None, "planned only where the recipe asks for it"
    prompts, seeds = material.prompts(config.num_pictures)
    curves = {}
    for model in config.models:
        curves[model] = [
            {
                "scale": scale,
                **judge(
                    material,
                    material.draw(prompts, seeds, guidance=scale, model=model),
                    prompts,
                ),
            }
            for scale in config.scales
        ]
    lines = [
        Line(
            label=model,
            x=[point["alignment"]["score"] for point in points],
            y=[point["distance"]["frechet"] for point in points],
            error=[_error(point["distance"]) for point in points],
            texts=[f"{point['scale']:g}" for point in points],
        )
        for model, points in curves.items()
    ]
    line_chart(
        material.workspace.scratch / PICTURE,
        lines,
        x_label=f"text alignment ({material.recipe.evaluate.alignment})",
        y_label="Fréchet distance",
    )
    num = config.num_pictures * len(config.scales) * len(config.models)
    return Measured(
        document={"guidance_curve": curves}, pictures=(PICTURE,), num_in=num, num_out=num
    )


def _error(distance: dict[str, float]) -> tuple[float, float]:
    value = distance["frechet"]
    return max(0.0, value - distance["frechet_low"]), max(0.0, distance["frechet_high"] - value)
