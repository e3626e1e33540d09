"""Export: a student, or any Hugging Face causal LM folder, to the formats that devices run; verified or not written.

    export("runs/demo/student", "onnx-int4", out="runs/demo/export/onnx-int4")

`to_onnx`, `to_gguf` and `to_bitsandbytes` write, `read_back` reads the files again, `verify` holds the two together;
`formats` is the table of them. Only compressor's cli and pipeline, and people, import this package.
"""

from .artifact import MANIFEST, export, read_manifest
from .settings import DEFAULT_PRECISION, PRECISIONS, Settings, parse

__all__ = ["DEFAULT_PRECISION", "MANIFEST", "PRECISIONS", "Settings", "export", "parse", "read_manifest"]
