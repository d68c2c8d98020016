"""What each text encoder is good for: drawing with one alone, and with all (section 6)."""

from __future__ import annotations

from pipelines.stages.evaluation.charts import picture_grid
from pipelines.stages.evaluation.drawings import judge
from pipelines.stages.evaluation.material import Material, Measured

PICTURE = "text_ablation.png"


def measure_text_ablation(material: Material) -> Measured:
    """Judge the ensemble's drawings for equal captions and seeds, told by one stream or all.

    The other streams are dropped whole, as training drops them; nothing is trained anew.
    """
    config = material.recipe.evaluate.text_ablation
    assert config is not None, "planned only where the recipe asks for it"
    texts = [name for name, encoder in material.recipe.encoders.items() if not encoder.is_image]
    prompts, seeds = material.prompts(config.num_pictures)
    rows, pictures = [], {}
    for streams in (texts, *([name] for name in texts)):
        dropped = [name for name in texts if name not in streams]
        drawn = material.draw(prompts, seeds, dropped_streams=dropped)
        rows.append({"streams": streams, **judge(material, drawn, prompts)})
        pictures[" and ".join(streams)] = drawn.unsqueeze(1)
    picture_grid(material.workspace.scratch / PICTURE, prompts, pictures)
    num = config.num_pictures * len(rows)
    return Measured(document={"text_ablation": rows}, pictures=(PICTURE,), num_in=num, num_out=num)
