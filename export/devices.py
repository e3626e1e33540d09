"""Devices and budgets: what there is of memory, disk and speed, and whether a model stays within it.

A profile is data (profiles/*.yaml), each figure with its source; `host` is this machine, measured. Latency on another
device is a roofline (Williams et al. 2009): the longer of the time to move the bytes and the time to do the arithmetic.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from compressor.checkpoint import read_config
from compressor.errors import UserError
from compressor.families import FAMILIES
from compressor.shape import Shape

UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
PREFIXES = {"": 1.0, "M": 1e6, "G": 1e9, "T": 1e12}
# budget -> (how a value is read, whether less is better, what it is called)
BUDGETS = {
    "memory": ("bytes", True, "memory"),
    "disk": ("bytes", True, "size on disk"),
    "ttft": ("seconds", True, "time to first token"),
    "load": ("seconds", True, "load time"),
    "decode": ("rate", False, "decode tokens/s"),
    "prefill": ("rate", False, "prefill tokens/s"),
}


@dataclass(frozen=True)
class Device:
    """A device: bytes of memory and disk, bytes/s of memory, cores, float32 FLOP/s. Estimates only, but for `host`."""

    name: str
    title: str
    ram: int
    reserved: int
    disk: int
    memory_bandwidth: float
    cores: int
    compute: float
    unit: str

    @property
    def free(self) -> int:
        """Bytes of memory that a model may take."""
        return self.ram - self.reserved

    def to_dict(self) -> dict[str, Any]:
        """As written to a benchmark's JSON."""
        return asdict(self)


def device(name: str, *, threads: int | None = None) -> Device:
    """A profile by name; `host` measures this machine with `threads`. Raises UserError for an unknown name."""
    if name == "host":
        return _host(threads)
    known_device(name)
    path = resources.files("export") / "profiles" / f"{name}.yaml"
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    return Device(
        name=values["name"],
        title=values["title"],
        ram=parse_bytes(values["ram"]),
        reserved=parse_bytes(values["reserved"]),
        disk=parse_bytes(values["disk"]),
        memory_bandwidth=_rate(values["memory_bandwidth"], "B/s"),
        cores=values["cores"],
        compute=_rate(values["compute"], "FLOP/s"),
        unit=values["unit"],
    )


def known_device(name: str) -> None:
    """Raise UserError, with the names there are, for a device without a profile."""
    if name not in ("host", *names()):
        raise UserError(f"device {name!r} is not known; expected one of {', '.join(['host', *names()])}")


def names() -> list[str]:
    """The profiles there are."""
    folder = resources.files("export") / "profiles"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def _host(threads: int | None) -> Device:
    import shutil

    from compressor.memory import available_memory

    from .machine import cores, machine, speed

    count = threads or cores()
    bandwidth, compute = speed(count)
    found = machine()
    ram = found["memory_bytes"] or 0
    free = available_memory()
    taken = ram - free if free is not None else 0
    disk = shutil.disk_usage(".").free
    return Device("host", f"this machine: {found['processor']}", ram, taken, disk, bandwidth, count, compute, "cpu")


@dataclass(frozen=True)
class Budget:
    """One line of a budget: a value in bytes, seconds or tokens per second."""

    key: str
    limit: float

    def check(self, value: float | None, *, estimate: bool = False) -> dict[str, Any]:
        """The verdict: passed, and the margin as a share of the limit (positive where there is room)."""
        kind, less, words = BUDGETS[self.key]
        margin = None
        if value is not None:
            margin = (1 if less else -1) * (self.limit - value) / self.limit
        return {
            "budget": self.key,
            "what": words,
            "unit": kind,
            "limit": self.limit,
            "value": value,
            "estimate": estimate,
            "margin": margin,
            "passed": margin is not None and margin >= 0,
        }


def parse_budget(text: str) -> Budget:
    """`memory=1GiB`, `ttft=500ms`, `decode=20` -> Budget. Raises UserError."""
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or key not in BUDGETS:
        raise UserError(f"budget {text!r} is not known; expected KEY=VALUE with one of {', '.join(BUDGETS)}")
    kind = BUDGETS[key][0]
    if kind == "bytes":
        try:
            limit: float = parse_bytes(value)
        except UserError as error:
            raise UserError(f"budget {text!r}: {error}") from None
    elif kind == "seconds":
        found = re.fullmatch(r"([\d.]+)\s*(ms|s)", value.strip())
        if not found:
            raise UserError(f"budget {text!r} is no time; expected for example {key}=500ms or {key}=2s")
        limit = _number(found[1], text) * (1e-3 if found[2] == "ms" else 1)
    else:
        limit = _number(re.sub(r"\s*(tok|tokens)/s$", "", value.strip()), text)
    if limit <= 0:
        raise UserError(f"budget {text!r} leaves nothing; expected more than zero")
    return Budget(key, limit)


def _number(text: str, whole: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"budget {whole!r} is no number; expected for example decode=20") from None


def parse_bytes(text: str) -> int:
    """`1GiB`, `500MB` -> bytes. Raises UserError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)\s*([a-zA-Z]+)", text.strip())
    if not found or found[2].upper() not in UNITS:
        raise UserError(f"{text!r} is no size; expected for example 500MB or 1.5GiB")
    return int(float(found[1]) * UNITS[found[2].upper()])


def _rate(text: str, unit: str) -> float:
    found = re.fullmatch(rf"([\d.]+)([MGT]?){unit}", text)
    assert found, text
    return float(found[1]) * PREFIXES[found[2]]


def shape_for_estimates(folder: Path | str) -> Shape:
    """The Shape of a model; for a family without a row one of the same sizes, near enough for a roofline."""
    config = read_config(folder)
    if config["model_type"] in FAMILIES:
        return Shape.from_config(config)
    from transformers import AutoConfig

    found: Any = AutoConfig.from_pretrained(folder, local_files_only=True)
    heads = getattr(found, "num_attention_heads", None)
    if heads is None:
        raise UserError(f"a {found.model_type} model has no attention heads; expected a decoder; bench another model")
    head_dim = getattr(found, "head_dim", None) or found.hidden_size // heads
    return Shape(
        "mistral",  # which lets the hidden size differ from heads times head_dim
        num_layers=found.num_hidden_layers,
        hidden=found.hidden_size,
        ffn=getattr(found, "intermediate_size", None) or getattr(found, "ffn_dim", None) or 4 * found.hidden_size,
        num_heads=heads,
        num_kv_heads=getattr(found, "num_key_value_heads", None) or heads,
        head_dim=head_dim,
        vocab=found.vocab_size,
        tied=bool(found.tie_word_embeddings),
    )


@dataclass(frozen=True)
class Workload:
    """What a model in its runtime asks of a device.

    nbytes: of its weights in memory. every_logit: the runtime computes logits at every position of a prompt, not at
    the last one alone.
    """

    shape: Shape
    nbytes: int
    kv_bytes_per_value: int
    every_logit: bool = False

    @property
    def kv_bytes_per_token(self) -> int:
        return self.shape.kv_bytes_per_token(self.kv_bytes_per_value)

    @property
    def moved_bytes(self) -> float:
        """Bytes of weights that one token reads: all but an embedding of its own, of which it reads one row."""
        if self.shape.tied:
            return self.nbytes
        return self.nbytes * (1 - self.shape.vocab * self.shape.hidden / self.shape.parameters)

    def decode_seconds(self, device: Device, depth: int) -> float:
        """Roofline of one more token after `depth`."""
        moved = self.moved_bytes + depth * self.kv_bytes_per_token
        return max(moved / device.memory_bandwidth, self.shape.flops_per_token(depth) / device.compute)

    def prefill_seconds(self, device: Device, prompt: int) -> float:
        """Roofline of reading `prompt` tokens at once: the weights are moved once, the arithmetic is done for each."""
        flops = prompt * self.shape.flops_per_token(prompt / 2)
        if not self.every_logit:
            flops -= 2 * (prompt - 1) * self.shape.vocab * self.shape.hidden
        return max(self.moved_bytes / device.memory_bandwidth, flops / device.compute)

    def memory(self, *, context: int, prompt: int, baseline: int) -> dict[str, int]:
        """Predicted bytes: weights, KV cache at `context`, activations while `prompt` tokens are read, the runtime.

        Activations are the widest that live at once: logits, and a few rows of hidden and ffn sizes for the prompt.
        """
        shape = self.shape
        widest = 2 * shape.ffn + 3 * shape.hidden + shape.size("heads") + 2 * shape.size("kv_heads")
        parts = {
            "weights": self.nbytes,
            "kv_cache": context * self.kv_bytes_per_token,
            "activations": 4 * ((prompt if self.every_logit else 1) * shape.vocab + prompt * widest),
            "runtime": baseline,
        }
        return parts | {"total": sum(parts.values())}
