"""Mask2Former as detectron2 saves it, in mmdet's names.

Both have the same network, in the same order of layers and levels; the background is the last class
of both. `tests/golden/detection` holds what the authors' head computes.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from vitarium.checkpoints import Renames

_LOSS = "criterion."
_THEIRS, _OURS = "sem_seg_head.pixel_decoder.", "panoptic_head.pixel_decoder."
_ENCODER, _LAYER = "transformer.encoder.layers.{i}.", "encoder.layers.{i}."
_PREDICTOR, _DECODER = "sem_seg_head.predictor.", "panoptic_head.transformer_decoder."
_NAMES = Renames(
    [
        (f"{_THEIRS}input_proj.{{i}}.0.", f"{_OURS}input_convs.{{i}}.conv."),
        (f"{_THEIRS}input_proj.{{i}}.1.", f"{_OURS}input_convs.{{i}}.gn."),
        (f"{_THEIRS}transformer.level_embed", f"{_OURS}level_encoding.weight"),
        *(
            (f"{_THEIRS}{_ENCODER}{theirs}.", f"{_OURS}{_LAYER}{ours}.")
            for theirs, ours in (
                ("self_attn", "self_attn"),
                ("norm1", "norms.0"),
                ("linear1", "ffn.layers.0.0"),
                ("linear2", "ffn.layers.1"),
                ("norm2", "norms.1"),
            )
        ),
        (f"{_THEIRS}adapter_{{i+1}}.norm.", f"{_OURS}lateral_convs.{{i}}.gn."),
        (f"{_THEIRS}adapter_{{i+1}}.", f"{_OURS}lateral_convs.{{i}}.conv."),
        (f"{_THEIRS}layer_{{i+1}}.norm.", f"{_OURS}output_convs.{{i}}.gn."),
        (f"{_THEIRS}layer_{{i+1}}.", f"{_OURS}output_convs.{{i}}.conv."),
        (f"{_THEIRS}mask_features.", f"{_OURS}mask_feature."),
        *(
            (f"{_PREDICTOR}transformer_{theirs}.", f"{_DECODER}layers.{{i}}.{ours}.")
            for theirs, ours in (
                ("cross_attention_layers.{i}.multihead_attn", "cross_attn.attn"),
                ("cross_attention_layers.{i}.norm", "norms.0"),
                ("self_attention_layers.{i}.self_attn", "self_attn.attn"),
                ("self_attention_layers.{i}.norm", "norms.1"),
                ("ffn_layers.{i}.linear1", "ffn.layers.0.0"),
                ("ffn_layers.{i}.linear2", "ffn.layers.1"),
                ("ffn_layers.{i}.norm", "norms.2"),
            )
        ),
        (f"{_PREDICTOR}decoder_norm.", f"{_DECODER}post_norm."),
        *(
            (f"{_PREDICTOR}{theirs}.", f"panoptic_head.{ours}.")
            for theirs, ours in (
                ("query_feat", "query_feat"),
                ("query_embed", "query_embed"),
                ("level_embed", "level_embed"),
                ("class_embed", "cls_embed"),
                *((f"mask_embed.layers.{i}", f"mask_embed.{2 * i}") for i in range(3)),
            )
        ),
    ]
)


def from_detectron2(
    state_dict: Mapping[str, Tensor], model: nn.Module
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A detector's tensors in mmdet's names, if these are detectron2's; others stay as they are.

    Args:
        state_dict: tensors by name, of the backbone too, whose names stay.
        model: the detector; it is not changed.

    Returns:
        Tensors by mmdet's names, and names that mmdet's model rightly lacks, with why.

    Raises:
        CheckpointError: two names lead to one.
    """
    renamed = _NAMES.to_ours(state_dict, model)
    if renamed.keys() == state_dict.keys():
        return renamed, {}
    dropped = [name for name in renamed if name.startswith(_LOSS)]
    kept = {name: x for name, x in renamed.items() if name not in dropped}
    return kept, dict.fromkeys(dropped, "of the loss, which the config describes")
