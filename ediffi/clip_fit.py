"""Fit a small CLIP contrastively on the run's own pictures and captions.

Stands in for CLIP ViT-L/14 (eDiff-I section 5) where no pretrained weights can be had. The result
is an ordinary open_clip directory, loaded by the same encoder code as the real one.

Shape legend: N pictures, B those of one batch, U distinct captions, T tokens, D embedding width,
C H W.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL.Image import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from ediffi.encoders import clip_text_states

_HEAD_WIDTH = 32
_MAX_LOGIT_SCALE = math.log(100.0)  # as in CLIP: keeps the softmax from saturating
_EVALUATION_IMAGES = 256


@dataclass(frozen=True, kw_only=True)
class ClipFitConfig:
    """Size of the model and of the fit."""

    image_px: int
    num_patches: int = 4  # per side: the cost grows with its square, not with image_px
    width: int = 64  # of both towers
    num_layers: int = 2  # of each tower
    embedding_width: int = 64
    num_steps: int = 300
    batch_images: int = 128
    lr: float = 2e-3
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise ValueError naming the field, what it must be, and what was found."""
        for field in ("image_px", "num_patches", "num_layers", "embedding_width", "num_steps"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be positive, got {getattr(self, field)}")
        if self.image_px % self.num_patches:
            raise ValueError(
                f"num_patches must divide image_px ({self.image_px}), got {self.num_patches}"
            )
        if self.width < 1 or self.width % _HEAD_WIDTH:
            raise ValueError(
                f"width must be a positive multiple of {_HEAD_WIDTH} (one attention head), "
                f"got {self.width}"
            )
        if self.batch_images < 2:
            raise ValueError(
                f"batch_images must be at least 2, got {self.batch_images}: "
                "a contrastive loss needs something to contrast with"
            )
        if not self.lr > 0:
            raise ValueError(f"lr must be positive, got {self.lr}")

    def model_json(self) -> dict[str, Any]:
        """Architecture, as in the `model_cfg` of open_clip_config.json."""
        tower = {"width": self.width, "layers": self.num_layers}
        return {
            "embed_dim": self.embedding_width,
            "vision_cfg": {
                **tower,
                "image_size": self.image_px,
                "patch_size": self.image_px // self.num_patches,
                "head_width": _HEAD_WIDTH,
            },
            "text_cfg": {**tower, "heads": self.width // _HEAD_WIDTH},
        }


def fit_clip(
    samples: Sequence[tuple[Image, str]],
    config: ClipFitConfig,
    directory: Path,
    report: Callable[[dict[str, float]], None],
) -> dict[str, float]:
    """Fit on (picture, caption) pairs and save an open_clip directory.

    Equal inputs and seed give equal bytes on one thread. The global random state is left alone.

    Args:
        samples: pictures of any size and their captions; captions may repeat.
        directory: receives open_clip_model.safetensors and, last, open_clip_config.json.
        report: called about twenty times with {"images", "loss"}.

    Returns:
        Last loss, and top-1 accuracies over all pairs: `image_to_text_accuracy` among the
        distinct captions, `text_to_image_accuracy` among all pictures.

    Raises:
        ValueError: fewer than two distinct captions.
    """
    captions = sorted({caption for _, caption in samples})
    if len(captions) < 2:
        raise ValueError(
            f"samples must hold at least two distinct captions, got {len(captions)}: "
            "there is nothing to contrast"
        )
    caption_index = {caption: i for i, caption in enumerate(captions)}
    index_N = torch.tensor([caption_index[caption] for _, caption in samples])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = open_clip.CLIP(**config.model_json())
    x_NCHW = _normalised(samples, config)
    with _OnlyUsedTokens(model, _caption_ids(captions)) as ids_UT:
        loss = _fit(model, x_NCHW, ids_UT, index_N, config, report)
        accuracies = _accuracies(model, x_NCHW, ids_UT, index_N)
    _save(model, config, directory)
    return {"loss": loss, **accuracies}


def contrastive_loss(
    image_BD: Tensor, text_UD: Tensor, index_B: Tensor, logit_scale: Tensor
) -> Tensor:
    """CLIP's symmetric loss when several pictures of a batch share a caption.

    A picture is told from the U distinct captions only, and a caption's target is spread evenly
    over its pictures, so equal captions never count as negatives of each other. With U = B this
    is the usual loss.

    Args:
        image_BD: normalised. text_UD: normalised. index_B: caption of each picture, every caption
            at least once.
    """
    logits_BU = logit_scale * image_BD @ text_UD.T
    positives_UB = F.one_hot(index_B, len(text_UD)).T.float()
    targets_UB = positives_UB / positives_UB.sum(1, keepdim=True)
    return (F.cross_entropy(logits_BU, index_B) + F.cross_entropy(logits_BU.T, targets_UB)) / 2


def _fit(
    model: Any,
    x_NCHW: Tensor,
    ids_UT: Tensor,
    index_N: Tensor,
    config: ClipFitConfig,
    report: Callable[[dict[str, float]], None],
) -> float:
    optimizer, schedule = _optimizer(model, config)
    model.train()
    report_steps = max(1, config.num_steps // 20)
    for step, batch_B in enumerate(_batches(len(x_NCHW), config), start=1):
        used_U, index_B = index_N[batch_B].unique(return_inverse=True)
        image_BD = model.encode_image(x_NCHW[batch_B], normalize=True)
        _, text_UD = clip_text_states(model, ids_UT[used_U])
        loss = contrastive_loss(image_BD, text_UD, index_B, model.logit_scale.exp())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=_MAX_LOGIT_SCALE)
        if step % report_steps == 0 or step == config.num_steps:
            report({"images": float(step * len(batch_B)), "loss": loss.item()})
    return loss.item()


def _optimizer(
    model: nn.Module, config: ClipFitConfig
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW that decays matrices only; linear warm-up over a tenth, then a cosine to zero."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=config.lr,
        betas=(0.9, 0.98),
    )
    num_warmup = max(1, config.num_steps // 10)

    def factor(step: int) -> float:
        return min((step + 1) / num_warmup, 0.5 + 0.5 * math.cos(math.pi * step / config.num_steps))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def _batches(num_samples: int, config: ClipFitConfig) -> Iterator[Tensor]:
    """`num_steps` index batches; each pass over the samples is a new permutation."""
    generator = torch.Generator().manual_seed(config.seed)
    batch_images = min(config.batch_images, num_samples)
    batches: list[Tensor] = []
    for _ in range(config.num_steps):
        if not batches:
            permutation = torch.randperm(num_samples, generator=generator)
            batches = [b for b in permutation.split(batch_images) if len(b) == batch_images]
        yield batches.pop()


@torch.inference_mode()
def _accuracies(model: Any, x_NCHW: Tensor, ids_UT: Tensor, index_N: Tensor) -> dict[str, float]:
    model.eval()
    image_ND = torch.cat(
        [model.encode_image(x, normalize=True) for x in x_NCHW.split(_EVALUATION_IMAGES)]
    )
    text_UD = torch.cat([clip_text_states(model, ids)[1] for ids in ids_UT.split(256)])
    cosine_NU = image_ND @ text_UD.T
    best_caption_N, best_picture_U = cosine_NU.argmax(1), cosine_NU.argmax(0)
    own_U = torch.arange(len(text_UD))
    return {
        "image_to_text_accuracy": (best_caption_N == index_N).float().mean().item(),
        "text_to_image_accuracy": (index_N[best_picture_U] == own_U).float().mean().item(),
    }


class _OnlyUsedTokens:
    """Train only the embeddings of tokens that occur.

    The table has 49,408 rows and captions touch a few dozen: updating all of it would take most of
    each step. Inside the context the model holds a table of the used rows, and ids count within
    it; their order is kept, so the end token is still the largest, which is how CLIP finds it.
    """

    def __init__(self, model: Any, ids_UT: Tensor) -> None:
        self._model = model
        self._table: nn.Embedding = model.token_embedding
        self._used, self._ids_UT = ids_UT.unique(return_inverse=True)

    def __enter__(self) -> Tensor:
        rows = self._table.weight.detach()[self._used]
        self._model.token_embedding = nn.Embedding.from_pretrained(rows, freeze=False)
        return self._ids_UT

    def __exit__(self, *error: object) -> None:
        with torch.no_grad():
            self._table.weight[self._used] = self._model.token_embedding.weight
        self._model.token_embedding = self._table


def _caption_ids(captions: Sequence[str]) -> Tensor:
    """Token ids (U, T), cut to the longest caption: the columns beyond would only cost time."""
    ids_UT = open_clip.SimpleTokenizer()(list(captions))
    return ids_UT[:, : int(ids_UT.argmax(1).max()) + 1]  # the end token has the largest id


def _normalised(samples: Sequence[tuple[Image, str]], config: ClipFitConfig) -> Tensor:
    """Pictures (N, C, H, W) through the transform with which encoders will read them."""
    transform = image_transform_v2(PreprocessCfg(size=config.image_px), is_train=False)
    return torch.stack([transform(picture.convert("RGB")) for picture, _ in samples])


def _save(model: nn.Module, config: ClipFitConfig, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, directory / "open_clip_model.safetensors")
    document = {"model_cfg": config.model_json(), "preprocess_cfg": {"size": config.image_px}}
    (directory / "open_clip_config.json").write_text(json.dumps(document, indent=2) + "\n")
