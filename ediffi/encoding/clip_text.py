"""The text tower of an open_clip CLIP, run on captions without padding to the full context.

Shape legend: B batch, T tokens, D width.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor
from torch.nn import functional as F


def clip_text_states(
    network: Any, ids_BT: Tensor, layer: Literal["last", "penultimate"] = "last"
) -> tuple[Tensor, Tensor]:
    """Run the text tower of an open_clip CLIP on captions padded to any common length.

    open_clip always pads to the full context; the tower is causal, so the columns after the end
    token change nothing and leaving them out is several times faster for short captions.

    Args:
        network: an `open_clip.CLIP` with a causal text tower.
        ids_BT: token ids, at most context_length columns; the end token has the largest id.
        layer: which block the states come from; the embedding is always that of the last.

    Returns:
        States after the final layer norm (B, T, D) and the normalised embedding (B, D).
    """
    from open_clip.transformer import text_global_pool

    num_columns = ids_BT.shape[1]
    dtype = network.transformer.get_cast_dtype()
    x_BTD = network.token_embedding(ids_BT).to(dtype)
    x_BTD = x_BTD + network.positional_embedding[:num_columns].to(dtype)
    mask_TT = network.attn_mask[:num_columns, :num_columns]
    before_last = []
    if layer == "penultimate":
        before_last_index = len(network.transformer.resblocks) - 2
        x_BTD, before_last = network.transformer.forward_intermediates(
            x_BTD, attn_mask=mask_TT, indices=[before_last_index]
        )
    else:
        x_BTD = network.transformer(x_BTD, attn_mask=mask_TT)
    x_BTD = network.ln_final(x_BTD)
    pooled_BD = text_global_pool(x_BTD, ids_BT, network.text_pool_type, network.text_eos_id)
    if network.text_projection is not None:
        pooled_BD = pooled_BD @ network.text_projection
    states_BTD = network.ln_final(before_last[0]) if before_last else x_BTD
    return states_BTD, F.normalize(pooled_BD, dim=-1)
