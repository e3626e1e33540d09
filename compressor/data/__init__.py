"""Data: a Hub id, JSONL, text, parquet, a folder of those, or `demo` -> packed text rows and masked chats.

`sources` reads records and sets the held-out ones aside by hash, `encoding` turns one record into token ids
with a mask of the tokens that count, `blocks` makes the rows and batches every stage is fed with.
"""

from .blocks import (
    Blocks,
    Counts,
    calibration_batches,
    collate,
    heldout_batches,
    heldout_rows,
    text_batches,
    token_fingerprint,
)
from .encoding import Example, check_same_tokens, encode
from .sources import DEFAULT_DATA, heldout, records

__all__ = [
    "DEFAULT_DATA",
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
    "records",
    "text_batches",
    "token_fingerprint",
]
