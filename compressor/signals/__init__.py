"""What training knows of the teacher at a batch's targets: asked while training (`online`), or read from disk.

A signal is called with a batch and the mask of its targets and gives a `losses.Teacher` of as many rows. `cached` reads
what `cache` has written: the top k with their tail, ids drawn from the teacher, or its final hidden states.
"""

from .cache import Kind, build, bytes_per_target, fingerprint
from .cached import Cached
from .online import Online, Signal, check_head, head_weight, observed, predicting

__all__ = [
    "Cached",
    "Kind",
    "Online",
    "Signal",
    "build",
    "bytes_per_target",
    "check_head",
    "fingerprint",
    "head_weight",
    "observed",
    "predicting",
]
