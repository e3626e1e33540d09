"""Shape: the sizes of a decoder, and what follows from them by counting.

Importance scores, architecture choice, surgery and reports all speak of models as Shapes. Students keep a
stock architecture - uniform layers, head_dim written out, the tie flag kept - and that is what makes them
load everywhere; so a Shape that stock transformers would refuse to build is refused here already.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from math import prod
from typing import Any

from . import families
from .errors import UserError

BITS = {"fp32": 32, "bf16": 16, "fp16": 16, "int8": 8, "int4": 4}

# Field of Shape -> key of config.json, for the sizes.
CONFIG_KEYS = {
    "num_layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "ffn": "intermediate_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "vocab": "vocab_size",
}


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder-only model of a family in `families.FAMILIES`.

    hidden, ffn, vocab and head_dim count channels; num_heads counts query heads, num_kv_heads key/value
    heads. Raises UserError for sizes that no stock model can have.
    """

    family: str
    num_layers: int
    hidden: int
    ffn: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab: int
    tied: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False

    def __post_init__(self) -> None:
        row = families.family(self.family)  # an unknown family is refused first
        for name in CONFIG_KEYS:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(f"{name} is {value!r}; a model needs a whole number of at least 1; correct the size")
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"{self.num_heads} heads do not share {self.num_kv_heads} KV heads evenly; "
                "use a multiple of the number of KV heads"
            )
        if self.head_dim % 2:
            raise UserError(
                f"head_dim is {self.head_dim}; rotary position embeddings turn channels in pairs; use an even head_dim"
            )
        if row.hidden_divides_by_heads and self.hidden % self.num_heads:
            raise UserError(
                f"hidden={self.hidden} is not a multiple of the {self.num_heads} heads, as stock "
                f"{self.family} models must be; use {max(1, self.hidden // self.num_heads) * self.num_heads}"
            )

    @property
    def untied(self) -> bool:
        """True when lm_head has weights of its own."""
        return not self.tied

    def size(self, axis: str) -> int:
        """The length of a named axis of `families.AXES`; heads and kv_heads are counted in rows."""
        sizes = {
            "vocab": self.vocab,
            "hidden": self.hidden,
            "ffn": self.ffn,
            "heads": self.num_heads * self.head_dim,
            "kv_heads": self.num_kv_heads * self.head_dim,
            "head_dim": self.head_dim,
        }
        return sizes[axis]

    @property
    def parameters(self) -> int:
        """All parameters, exactly: the sum over every tensor of the family (a tied head counts once)."""
        return sum(count * prod(map(self.size, row.axes)) for row, count in families.rows(self))

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the embedding, and of lm_head where it has its own."""
        return self.vocab * self.hidden * (1 if self.tied else 2)

    def nbytes(self, precision: str) -> int:
        """Bytes of the weights alone at fp32, bf16, fp16, int8 or int4.

        Block quantizers add their scales: with one 16-bit scale per 32 weights, 6 % of int8 and 12 % of int4.
        Raises UserError for another precision.
        """
        if precision not in BITS:
            raise UserError(f"precision {precision!r} is not known; known are {', '.join(BITS)}; use one of these")
        return -(-self.parameters * BITS[precision] // 8)

    def kv_bytes_per_token(self, bytes_per_value: int = 2) -> int:
        """Bytes of KV cache that one token of context takes: a key and a value per layer and KV head."""
        return 2 * self.num_layers * self.size("kv_heads") * bytes_per_value

    def flops_per_token(self, context: float = 0) -> int:
        """FLOPs of one token's forward pass that attends to `context` keys (a multiply-add counts two).

        Two per weight of each matrix, lm_head included (also when tied) and the embedding look-up not; plus
        queries times keys and weights times values, 2 * context * heads * head_dim each per layer. When a
        whole causal sequence of T tokens is read, the mean context is T / 2. The backward pass costs twice as
        much.
        """
        weights = sum(
            count * prod(map(self.size, row.axes))
            for row, count in families.rows(self)
            if len(row.axes) == 2 and row.per_layer
        )
        attention = 4 * context * self.size("heads") * self.num_layers
        return round(2 * (weights + self.vocab * self.hidden) + attention)

    @classmethod
    def from_config(cls, config: Any) -> Shape:
        """The Shape of a Hugging Face config: a dict as in config.json, or a PreTrainedConfig.

        Keys that are left out take the default of the family's config class. Raises UserError for a
        model_type without a row, for a missing size, and for sizes that no stock model can have.
        """
        values: Mapping[str, Any] = config if isinstance(config, Mapping) else config.to_dict()
        row = families.family(str(values.get("model_type")))
        sizes = dict(row.defaults) | {key: values[key] for key in CONFIG_KEYS.values() if key in values}
        needed = [key for key in CONFIG_KEYS.values() if key not in ("num_key_value_heads", "head_dim")]
        missing = [key for key in needed if sizes.get(key) is None]
        if missing:
            raise UserError(
                f"the config has no {', '.join(missing)}; a {row.model_type} config.json states every size; "
                "use the config.json that was saved with the weights"
            )
        if sizes.get("num_key_value_heads") is None:
            sizes["num_key_value_heads"] = sizes["num_attention_heads"]
        if sizes.get("head_dim") is None:
            sizes["head_dim"] = _head_dim(sizes)
        flags = {
            flag: source if isinstance(source, bool) else bool(values.get(source, False))
            for flag, source in row.flags.items()
        }
        return cls(
            family=row.model_type,
            **{name: sizes[key] for name, key in CONFIG_KEYS.items()},
            tied=bool(values.get("tie_word_embeddings", False)),
            **flags,
        )

    def to_config(self, base: Mapping[str, Any], *, layers: Sequence[int] | None = None) -> dict[str, Any]:
        """The config of a student of this Shape: the teacher's config `base` with the sizes replaced.

        head_dim is written out, since hidden / heads no longer gives it. A list of attention types per layer
        is cut to `layers`, the teacher's layers that are kept; they need to be named only where the types
        differ. Raises UserError when the result would not read back as this Shape, for instance when `base`
        belongs to another family.
        """
        types = _layer_types(base)
        config = dict(base)
        config |= {key: getattr(self, name) for name, key in CONFIG_KEYS.items()}
        config["tie_word_embeddings"] = self.tied
        if types is not None:
            kept = list(range(self.num_layers)) if layers is None else list(layers)
            if layers is None and self.num_layers != len(types) and len(set(types)) > 1:
                raise UserError(
                    "the teacher's layers differ in their attention; a student with fewer layers depends on "
                    "which are kept; name the kept layers"
                )
            if len(kept) != self.num_layers or any(not 0 <= i < len(types) for i in kept):
                raise UserError(
                    f"layers {kept} do not pick {self.num_layers} of the teacher's {len(types)} layers; "
                    "name each kept layer once"
                )
            config["layer_types"] = [types[i] for i in kept]
        back = Shape.from_config(config)
        if back != self:
            wrong = [f.name for f in fields(self) if getattr(back, f.name) != getattr(self, f.name)]
            raise UserError(
                f"a config of this {base.get('model_type')} model cannot express {', '.join(wrong)} of the "
                "shape; use the config of the teacher that the shape was cut from"
            )
        return config

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values, as written to shape.json."""
        return asdict(self)


def _head_dim(sizes: Mapping[str, Any]) -> int:
    """hidden / heads, rounded down as the config classes do."""
    hidden, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    if not isinstance(hidden, int) or not isinstance(heads, int) or heads < 1:
        raise UserError(
            f"hidden_size is {hidden!r} and num_attention_heads is {heads!r}; both must be whole numbers of "
            "at least 1; correct config.json"
        )
    return hidden // heads


def _layer_types(base: Mapping[str, Any]) -> list[str] | None:
    """The attention type of each layer of the teacher, also where its config only implies them."""
    types = base.get("layer_types")
    if types is not None:
        return list(types)
    if base.get("use_sliding_window") and base.get("sliding_window") is not None and "max_window_layers" in base:
        first = base["max_window_layers"]
        count = base["num_hidden_layers"]
        return ["sliding_attention" if i >= first else "full_attention" for i in range(count)]
    return None
