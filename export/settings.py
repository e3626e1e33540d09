"""What can be exported: formats, their precisions, and the dials of one export."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from typing import Any

from compressor.errors import UserError

from .rounding import ALGORITHMS

PRECISIONS: dict[str, tuple[str, ...]] = {
    "onnx": ("fp32", "fp16", "int8", "int4"),
    "bitsandbytes": ("nf4", "int8"),
    "gguf": ("f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q5_1", "q5_0", "q4_k_m", "q4_1", "q4_0"),
}
DEFAULT_PRECISION = {"onnx": "int4", "bitsandbytes": "nf4", "gguf": "q8_0"}
BLOCKS = (16, 32, 64, 128, 256)
SENSITIVE = ("head", "first", "last")
FLAGS = {"block": "block-size", "tokenizer_pre": "tokenizer-pre"}  # where the option has another name


@dataclass(frozen=True)
class Settings:
    """One export. block, algorithm, sensitive and web are ONNX's; tokenizer_pre is GGUF's.

    sensitive: the parts kept at 8 bits in an int4 graph. Raises UserError for a value that is not known.
    """

    format: str
    precision: str
    block: int = 64
    algorithm: str = "rtn"
    sensitive: tuple[str, ...] = ("head",)
    web: bool = False
    tokenizer_pre: str | None = None

    def __post_init__(self) -> None:
        _known("format", self.format, tuple(PRECISIONS))
        _known(f"precision of {self.format}", self.precision, PRECISIONS[self.format])
        _known("block size", self.block, BLOCKS)
        _known("algorithm", self.algorithm, tuple(ALGORITHMS))
        for part in self.sensitive:
            _known("sensitive part", part, SENSITIVE)

    @property
    def name(self) -> str:
        """onnx-int4: what a run's export folder and a report call it; with `web` onnx-int4-web."""
        return f"{self.format}-{self.precision}" + ("-web" if self.web else "")

    def to_dict(self) -> dict[str, Any]:
        """As written to export.json; dials of other formats are left out."""
        values = asdict(self) | {"sensitive": list(self.sensitive)}
        return {key: values[key] for key in ("format", "precision", *self.dials)}

    @property
    def dials(self) -> tuple[str, ...]:
        """The dials that change what is written; with `web` there are int8 and int4 graphs whatever the precision."""
        if self.format == "gguf":
            return ("tokenizer_pre",)
        if self.format != "onnx":
            return ()
        if self.web or self.precision == "int4":
            return ("block", "algorithm", "sensitive", "web")
        return ("block", "web") if self.precision == "int8" else ("web",)

    def bits(self, name: str, *, layers: int, tied: bool, precision: str) -> int | None:
        """The width of a matrix in an ONNX graph, by its Hugging Face name; None in floating point."""
        head = name.startswith("lm_head") or (tied and "embed_tokens" in name)
        return self.bits_of({"head"} if head else layer_parts(name, layers), precision)

    def bits_of(self, parts: Collection[str], precision: str) -> int | None:
        """The width of a matrix that belongs to `parts`: head, first, last, or none of them."""
        if precision == "int8":
            return 8
        if precision not in ("int4", "q4f16"):
            return None
        return 8 if set(parts) & set(self.sensitive) else 4


def layer_parts(name: str, layers: int) -> set[str]:
    """first and last, where a tensor's name tells of that layer."""
    found = re.search(r"\.(\d+)\.", name)
    return {part for part, layer in (("first", 0), ("last", layers - 1)) if found and int(found[1]) == layer}


def in_layers(name: str) -> bool:
    """Whether a tensor belongs to a layer, by its name."""
    return re.search(r"\.\d+\.", name) is not None


def settings_of(format: str, precision: str | None = None, **dials: Any) -> Settings:
    """Settings with the dials that are not None; `sensitive` is a text, its parts separated by commas, or "none".

    Raises UserError for a dial that the format does not have.
    """
    settings = parse(f"{format}-{precision}" if precision else format)
    given = {key: value for key, value in dials.items() if value is not None}
    known = replace(settings, web=bool(given.get("web")) and settings.format == "onnx").dials
    for key in given:
        if key not in known:
            words = ", ".join(f"--{FLAGS.get(name, name)}" for name in known) or "none"
            raise UserError(f"--{FLAGS.get(key, key)} is no option of {settings.name}; expected {words}; leave it out")
    if "sensitive" in given:
        parts = given["sensitive"].split(",")
        given["sensitive"] = () if parts == ["none"] else tuple(part.strip() for part in parts)
    return replace(settings, **given)


def _known(what: str, value: Any, known: tuple[Any, ...]) -> None:
    if value not in known:
        raise UserError(f"{what} {value!r} is not known; expected one of {', '.join(map(str, known))}")


def parse(text: str) -> Settings:
    """`onnx-int4` -> Settings; a bare format has its default precision. Raises UserError."""
    format, _, precision = text.strip().partition("-")
    _known("format", format, tuple(PRECISIONS))
    return Settings(format, precision or DEFAULT_PRECISION[format])
