"""`python -m serve WHAT ...` is `compressor serve WHAT ...`."""

import sys

from compressor.cli import run

if __name__ == "__main__":
    sys.exit(run(["serve", *sys.argv[1:]]))
