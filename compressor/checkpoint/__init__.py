"""Hugging Face checkpoints: safetensors lazily in, sharded out, config and tokenizer beside them."""

from .layout import DTYPES
from .reading import (
    DEMO_FOLDER,
    Checkpoint,
    Stored,
    check_finite,
    count_parameters,
    load_gguf,
    load_model,
    load_tokenizer,
    read_config,
    resolve,
    skeleton,
    weight_files,
)
from .writing import Described, copy_files, copy_tokenizer, require_space, write_checkpoint

__all__ = [
    "DEMO_FOLDER",
    "DTYPES",
    "Checkpoint",
    "Described",
    "Stored",
    "check_finite",
    "copy_files",
    "copy_tokenizer",
    "count_parameters",
    "load_gguf",
    "load_model",
    "load_tokenizer",
    "read_config",
    "require_space",
    "resolve",
    "skeleton",
    "weight_files",
    "write_checkpoint",
]
