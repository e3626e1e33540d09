"""Data: a Hub id, JSONL, text, parquet, a folder of those, or `demo` -> packed text rows and masked chats.

`sources` reads records and sets the held-out ones aside by hash, `preferences` reads pairs of answers, `encoding`
turns one record into token ids with a mask of the tokens that count, `blocks` makes the rows and batches every stage
is fed with, and `batches` says what a batch means to a model.
"""

from .batches import IGNORED, Batch, hidden_states, position_ids, real_tokens, targets
from .blocks import (
    Blocks,
    Counts,
    calibration_batches,
    collate,
    heldout_batches,
    heldout_rows,
    shuffled,
    text_batches,
)
from .encoding import Example, check_same_tokens, encode, num_ids
from .preferences import preferences, prompt_hash
from .sources import DEFAULT_DATA, heldout, records

__all__ = [
    "DEFAULT_DATA",
    "IGNORED",
    "Batch",
    "Blocks",
    "Counts",
    "Example",
    "calibration_batches",
    "check_same_tokens",
    "collate",
    "encode",
    "heldout",
    "heldout_batches",
    "heldout_rows",
    "hidden_states",
    "num_ids",
    "position_ids",
    "preferences",
    "prompt_hash",
    "real_tokens",
    "records",
    "shuffled",
    "targets",
    "text_batches",
]
