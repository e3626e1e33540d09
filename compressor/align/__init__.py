"""Alignment of a distilled student: supervised fine-tuning on chats, then DPO on preference pairs, by TRL's trainers.

`rows` makes what the trainers read, `pairs` makes preference pairs from the models' own answers where none are given,
and `training` runs SFTTrainer or DPOTrainer so that a kill costs nothing. NVIDIA did the same on NeMo-Aligner
(arXiv 2408.11796, section 4).
"""

from .pairs import Answer, build, ranked
from .rows import chats, divided, preference_rows
from .training import Aligned, check, train

__all__ = [
    "Aligned",
    "Answer",
    "build",
    "chats",
    "check",
    "divided",
    "preference_rows",
    "ranked",
    "train",
]
