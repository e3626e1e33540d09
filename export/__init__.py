"""Export: a student, or any Hugging Face causal LM folder, to the formats that devices run; verified or not written.

    export("runs/demo/student", "onnx-int4", out="runs/demo/export/onnx-int4")

`to_onnx`, `to_gguf` and `to_bitsandbytes` write, `read_back` reads the files again, `verify` holds the two together;
`formats` is the table of them. `bench` measures, `devices` knows budgets. Only compressor's cli and pipeline import
this package, inside functions.
"""

from .artifact import MANIFEST, describe, export, read_manifest, record
from .bench import REPEATS, bench
from .devices import known_device, parse_budget
from .settings import DEFAULT_PRECISION, PRECISIONS, Settings, parse, settings_of

__all__ = [
    "DEFAULT_PRECISION",
    "MANIFEST",
    "PRECISIONS",
    "REPEATS",
    "Settings",
    "bench",
    "describe",
    "export",
    "known_device",
    "parse",
    "parse_budget",
    "read_manifest",
    "record",
    "settings_of",
]
