"""Which tensor of a checkpoint has which axes: one table row per Hugging Face model_type.

Importance, surgery, counting and checking all read this table, so a new family whose tensors are named like
Llama's is a new row and nothing else. A pattern
is a tensor name with `{i}` where the layer number stands; its axes are named in the order of the dimensions
that are stored (a torch Linear holds out x in). "heads" and "kv_heads" are rows, that is heads times
head_dim. A flag names the attribute of `Shape` that must be true for the tensor to exist.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from .errors import UserError

if TYPE_CHECKING:
    from .shape import Shape

AXES = ("vocab", "hidden", "ffn", "heads", "kv_heads", "head_dim")


@dataclass(frozen=True)
class Tensor:
    """A row of the table: a name with `{i}` for the layer, its axes, and the flag of Shape it depends on."""

    pattern: str
    axes: tuple[str, ...]
    flag: str | None = None

    @property
    def per_layer(self) -> bool:
        return "{i}" in self.pattern


@dataclass(frozen=True)
class Points:
    """Where importance looks in a stock model: module names in the base model, and in one of its layers."""

    layers: str = "layers"
    final_norm: str = "norm"
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    ffn: str = "mlp.down_proj"
    heads: str = "self_attn.o_proj"


@dataclass(frozen=True)
class Family:
    """What stock transformers builds for one model_type.

    `flags` says where each flag of Shape comes from: a config key, or True for what the class always has.
    `defaults` holds the values the config class fills in for keys that a config.json leaves out.
    `droppable` are buffers that old checkpoints hold and the model computes by itself.
    `hidden_divides_by_heads`: the config class refuses a hidden size that is no multiple of the head count,
    although head_dim is given.
    """

    model_type: str
    tensors: tuple[Tensor, ...]
    flags: Mapping[str, str | bool] = field(default_factory=lambda: MappingProxyType({}))
    defaults: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    droppable: tuple[str, ...] = (
        "model.layers.{i}.self_attn.rotary_emb.inv_freq",
        "model.rotary_emb.inv_freq",
    )
    hidden_divides_by_heads: bool = False
    points: Points = Points()


# One decoder serves the four families: they differ in biases, norms on queries and keys, and config defaults.
_LAYER = "model.layers.{i}."
_DECODER = (
    Tensor("model.embed_tokens.weight", ("vocab", "hidden")),
    Tensor(_LAYER + "input_layernorm.weight", ("hidden",)),
    Tensor(_LAYER + "self_attn.q_proj.weight", ("heads", "hidden")),
    Tensor(_LAYER + "self_attn.q_proj.bias", ("heads",), "qkv_bias"),
    Tensor(_LAYER + "self_attn.k_proj.weight", ("kv_heads", "hidden")),
    Tensor(_LAYER + "self_attn.k_proj.bias", ("kv_heads",), "qkv_bias"),
    Tensor(_LAYER + "self_attn.v_proj.weight", ("kv_heads", "hidden")),
    Tensor(_LAYER + "self_attn.v_proj.bias", ("kv_heads",), "qkv_bias"),
    Tensor(_LAYER + "self_attn.o_proj.weight", ("hidden", "heads")),
    Tensor(_LAYER + "self_attn.o_proj.bias", ("hidden",), "output_bias"),
    Tensor(_LAYER + "self_attn.q_norm.weight", ("head_dim",), "qk_norm"),
    Tensor(_LAYER + "self_attn.k_norm.weight", ("head_dim",), "qk_norm"),
    Tensor(_LAYER + "post_attention_layernorm.weight", ("hidden",)),
    Tensor(_LAYER + "mlp.gate_proj.weight", ("ffn", "hidden")),
    Tensor(_LAYER + "mlp.gate_proj.bias", ("ffn",), "mlp_bias"),
    Tensor(_LAYER + "mlp.up_proj.weight", ("ffn", "hidden")),
    Tensor(_LAYER + "mlp.up_proj.bias", ("ffn",), "mlp_bias"),
    Tensor(_LAYER + "mlp.down_proj.weight", ("hidden", "ffn")),
    Tensor(_LAYER + "mlp.down_proj.bias", ("hidden",), "mlp_bias"),
    Tensor("model.norm.weight", ("hidden",)),
    Tensor("lm_head.weight", ("vocab", "hidden"), "untied"),
)

FAMILIES: dict[str, Family] = {
    "llama": Family(
        "llama",
        _DECODER,
        flags={"qkv_bias": "attention_bias", "output_bias": "attention_bias", "mlp_bias": "mlp_bias"},
        hidden_divides_by_heads=True,
    ),
    "mistral": Family("mistral", _DECODER, defaults={"num_key_value_heads": 8}),
    "qwen2": Family("qwen2", _DECODER, flags={"qkv_bias": True}, defaults={"num_key_value_heads": 32}),
    "qwen3": Family(
        "qwen3",
        _DECODER,
        flags={"qkv_bias": "attention_bias", "output_bias": "attention_bias", "qk_norm": True},
        defaults={"num_key_value_heads": 32, "head_dim": 128},
    ),
}


def family(model_type: str) -> Family:
    """The row of a Hugging Face model_type. Raises UserError that lists the rows there are."""
    row = FAMILIES.get(model_type)
    if row is None:
        raise UserError(
            f"model_type {model_type!r} is not known; known are {', '.join(FAMILIES)}; "
            "use a model of one of these families (export onnx takes others), or add a row to compressor/families.py"
        )
    return row


def attention_window(config: Any) -> int | None:
    """Tokens that a layer of a transformers config attends to, where that is less than its context."""
    window = getattr(config, "sliding_window", None)
    uses = getattr(config, "use_sliding_window", True)
    return window if uses and window is not None and window < config.max_position_embeddings else None


def rows(shape: Shape) -> Iterator[tuple[Tensor, int]]:
    """The rows that a checkpoint of this Shape has, each with the number of tensors it stands for."""
    for row in family(shape.family).tensors:
        if row.flag is None or getattr(shape, row.flag):
            yield row, shape.num_layers if row.per_layer else 1


def tensors(shape: Shape) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Every tensor a checkpoint of this Shape holds, as (name, axes): embedding, layers, norm, head."""
    table = [row for row, _ in rows(shape)]
    layer_rows = [row for row in table if row.per_layer]
    layers_done = False
    for row in table:
        if not row.per_layer:
            yield row.pattern, row.axes
        elif not layers_done:
            layers_done = True
            for i in range(shape.num_layers):
                for layer_row in layer_rows:
                    yield layer_row.pattern.format(i=i), layer_row.axes


def axes_of(shape: Shape, name: str) -> tuple[str, ...]:
    """The axes of one tensor of a checkpoint of this Shape, in the order of its dimensions.

    Raises UserError when a checkpoint of this Shape holds no tensor of that name: nothing is skipped
    silently. Ask `droppable` first for tensors that may be left out of the student.
    """
    pattern, layer = _pattern(name)
    row = next((row for row in family(shape.family).tensors if row.pattern == pattern), None)
    if row is None:
        raise UserError(
            f"tensor {name!r} is not part of a {shape.family} model; every tensor must be known before any "
            "is cut; use a plain checkpoint (no adapters, no quantized weights) of a known family"
        )
    if layer is not None and layer >= shape.num_layers:
        raise UserError(
            f"tensor {name!r} belongs to layer {layer} but config.json says {shape.num_layers} layers; "
            "use the config.json that was saved with these weights"
        )
    if row.flag is not None and not getattr(shape, row.flag):
        raise UserError(
            f"tensor {name!r} exists only with {row.flag}, which config.json does not have; "
            "use the config.json that was saved with these weights"
        )
    return row.axes


def droppable(shape: Shape, name: str) -> bool:
    """True for a tensor that stock transformers computes or shares by itself, so that a student needs no
    copy.

    These are the rotary buffers of old checkpoints, and an lm_head that was saved although it is tied.
    """
    if name == "lm_head.weight" and shape.tied:
        return True
    return _pattern(name)[0] in family(shape.family).droppable


def _pattern(name: str) -> tuple[str, int | None]:
    """Split a tensor name into its pattern and its layer: 'model.layers.3.x' -> ('model.layers.{i}.x', 3)."""
    found = re.fullmatch(r"(model\.layers\.)(\d+)(\..+)", name)
    if found is None:
        return name, None
    return f"{found[1]}{{i}}{found[3]}", int(found[2])
