"""`python -m export onnx WHAT ...` is `compressor export onnx WHAT ...`."""

import sys

from compressor.cli import run

if __name__ == "__main__":
    sys.exit(run(["export", *sys.argv[1:]]))
