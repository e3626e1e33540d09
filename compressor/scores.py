"""Scores: how important each layer, channel, neuron and head is; measured once, read by every later choice.

Saved as safetensors with the fingerprints of the teacher and of the calibration tokens in the metadata, so
that pruning again to another size needs no new forward pass and stale scores can be told.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .errors import UserError
from .run import write_bytes

if TYPE_CHECKING:
    from .shape import Shape


@dataclass
class Scores:
    """Importance per axis, as float32 on the CPU; higher is more important.

    hidden (H,), ffn (L, F), heads (L, num_heads), layers (L,) block influence of each layer; blocks: size n
    -> (L - n + 1,) block influence of layers i..i+n-1; removal: (first, stop) -> loss on the calibration rows
    in nats per token without layers first..stop-1. `about` holds how they were made: fingerprints of teacher and
    calibration tokens, aggregations, rows, tokens.
    """

    hidden: torch.Tensor
    ffn: torch.Tensor
    heads: torch.Tensor
    layers: torch.Tensor
    blocks: dict[int, torch.Tensor] = field(default_factory=dict)
    removal: dict[tuple[int, int], float] = field(default_factory=dict)
    about: dict[str, str] = field(default_factory=dict)

    @property
    def teacher(self) -> str:
        """Fingerprint of the teacher these scores belong to; empty when unknown."""
        return self.about.get("teacher", "")

    @property
    def calibration(self) -> str:
        """Fingerprint of the calibration tokens; empty for random scores."""
        return self.about.get("calibration", "")

    def save(self, path: Path | str) -> None:
        """Write safetensors, `about` as metadata: aside, synced, renamed. Raises UserError on a full disk."""
        from safetensors.torch import save

        tensors = {name: getattr(self, name).contiguous() for name in ("hidden", "ffn", "heads", "layers")}
        tensors |= {f"blocks.{size}": value.contiguous() for size, value in self.blocks.items()}
        if self.removal:
            tensors["removal.blocks"] = torch.tensor(list(self.removal), dtype=torch.int64)
            tensors["removal.losses"] = torch.tensor(list(self.removal.values()), dtype=torch.float64)
        write_bytes(Path(path), save(tensors, metadata=self.about))

    @classmethod
    def load(cls, path: Path | str) -> Scores:
        """Read what `save` wrote. Raises UserError for a file that is missing, broken or of another kind."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
                about = dict(file.metadata() or {})
            blocks = {int(n.split(".")[1]): t for n, t in tensors.items() if n.startswith("blocks.")}
            removal = {}
            if "removal.blocks" in tensors:
                pairs, losses = tensors["removal.blocks"].tolist(), tensors["removal.losses"].tolist()
                removal = {(first, stop): loss for (first, stop), loss in zip(pairs, losses, strict=True)}
            axes = (tensors[name] for name in ("hidden", "ffn", "heads", "layers"))
            return cls(*axes, blocks=blocks, removal=removal, about=about)
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise UserError(
                f"cannot read scores from {path} ({type(error).__name__}); expected a file that this version "
                "wrote; delete it to measure again"
            ) from error

    @classmethod
    def random(cls, shape: Shape, seed: int = 0) -> Scores:
        """Uniform random scores, for baselines; `removal` and `blocks` stay empty, so depth is random too."""
        generator = torch.Generator().manual_seed(seed)

        def draw(*sizes: int) -> torch.Tensor:
            return torch.rand(*sizes, generator=generator)

        count = shape.num_layers
        axes = (draw(shape.hidden), draw(count, shape.ffn), draw(count, shape.num_heads), draw(count))
        return cls(*axes, about={"random_seed": str(seed)})
