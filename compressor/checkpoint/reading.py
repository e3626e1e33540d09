"""Checkpoints in: a Hub id, a folder or `demo` -> rows of tensors, models, tokenizers.

A safetensors file is an 8-byte little-endian header length, a JSON header (dtype, shape and byte range of
each tensor), then the data. Rows are read with plain reads into a buffer that the caller may reuse, never
through a memory map: mapped pages count as resident memory. A broken file (truncated, missing, unreadable,
NaN inside) ends in one `UserError` line that names the file or tensor.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from functools import cached_property
from io import StringIO
from math import isfinite, prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit
from urllib.request import getproxies

from ..errors import UserError
from .layout import DTYPES, INDEX, OTHER_BYTES, SINGLE, TOKENIZER_FILES

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from ..shape import Shape

DEMO_FOLDER = Path(__file__).parent.parent / "demo" / "teacher"
HUB_PATTERNS = ("*.json", "README.md", "model*.safetensors", *TOKENIZER_FILES, "additional_chat_templates/*")
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
CHUNK_BYTES = 64 * 2**20  # of two tensors that are compared
SAMPLED_BLOCKS, BLOCK_BYTES = 16, 4096  # per tensor, for the fingerprint


class Stored(NamedTuple):
    """Where one tensor lies: dtype by its safetensors name ("BF16"), shape, file, first byte and length."""

    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int


def resolve(source: str) -> Path:
    """The local folder of a checkpoint: `demo` (embedded), a folder, or a Hub id (safetensors are fetched).

    Raises UserError when nothing is found, when the Hub cannot be reached, or when only .bin weights exist.
    """
    folder = _local(source)
    if folder is None:
        from huggingface_hub import snapshot_download

        with _hub(source) as cached:
            patterns: list[str] = list(HUB_PATTERNS)
            folder = Path(snapshot_download(source, allow_patterns=patterns, local_files_only=cached))
    weight_files(folder)
    return folder


def read_config(source: str | Path) -> dict[str, Any]:
    """The parsed config.json of `demo`, a folder or a Hub id (fetches that file alone). Raises UserError."""
    folder = _local(str(source))
    if folder is None:
        from huggingface_hub import hf_hub_download

        with _hub(str(source)) as cached:
            folder = Path(hf_hub_download(str(source), "config.json", local_files_only=cached)).parent
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"no config.json in {folder}; expected a Hugging Face model folder; check the path")
    config = _read_json(path)
    if not isinstance(config, dict) or "model_type" not in config:
        raise UserError(f"{path} names no model_type; expected a Hugging Face config; check the folder")
    return config


def _local(source: str) -> Path | None:
    """The folder that `source` means on this machine, or None for what can only be a Hub id."""
    if source == "demo":
        return DEMO_FOLDER
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists() or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise UserError(f"{source} is not a folder; expected a model folder, a Hub id or demo; check the path")
    return None


@contextmanager
def _hub(source: str) -> Iterator[bool]:
    """Whether to look in the cache alone; and everything that can go wrong (unknown, gated, offline), as one line."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HFValidationError,
        HTTPError,  # pyright: ignore[reportPrivateImportUsage] - httpx or httpx2
    )

    unreachable = _hub_is_unreachable()
    try:
        yield unreachable
    except (OSError, EntryNotFoundError, HFValidationError, HTTPError) as error:
        why = f"{type(error).__name__}: {_first_line(error)}"
        if unreachable and not isinstance(error, HFValidationError):
            why = "no network, and not in the cache"
        raise UserError(
            f"cannot get {source} ({why}); expected a folder, "
            "demo or a Hub id that this machine can reach; check the name, the network or `hf auth login`"
        ) from error


def _hub_is_unreachable() -> bool:
    """True where the Hub's name has no address: its library would retry for half a minute before it says so."""
    from huggingface_hub.constants import ENDPOINT

    if getproxies().keys() - {"no"}:  # a proxy resolves names itself
        return False
    try:
        socket.getaddrinfo(urlsplit(ENDPOINT).hostname, None)
    except OSError:
        return True
    return False


def weight_files(folder: Path) -> dict[str, set[str] | None]:
    """Safetensors file -> the tensors that the index promises in it (None: there is no index).

    Raises UserError for pickled weights only, none at all, a broken index, or missing shards.
    """
    if (folder / SINGLE).is_file():
        return {SINGLE: None}
    if not (folder / INDEX).is_file():
        if any(folder.glob("*.bin")) or any(folder.glob("*.pth")):
            raise UserError(
                f"{folder} holds only pickled weights (.bin); expected safetensors; convert it once with "
                "model.save_pretrained(...) in transformers"
            )
        raise UserError(f"{folder} holds no weights; expected {SINGLE} or {INDEX}; check the folder")
    index = _read_json(folder / INDEX)
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not names:
        raise UserError(f"{folder / INDEX} has no weight_map; expected one; copy the file again")
    files: dict[str, set[str] | None] = {}
    for tensor, file in names.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise UserError(
                f"{folder / INDEX} points outside its folder ({file}); expected plain file names; "
                "download the index again"
            )
        promised = files.setdefault(file, set())
        assert promised is not None
        promised.add(tensor)
    missing = sorted(file for file in files if not (folder / file).is_file())
    if missing:
        raise UserError(
            f"{folder} lacks {len(missing)} of {len(files)} shards ({', '.join(missing[:3])}"
            f"{', ...' if len(missing) > 3 else ''}); expected every shard of {INDEX}; download them again"
        )
    return files


class Checkpoint:
    """A folder of safetensors, opened lazily: headers at once, rows when asked for.

    Raises UserError for a missing shard, a truncated or corrupt file, or a quantized checkpoint (unless `quantized`
    says that only its files are to be checked).
    """

    def __init__(self, folder: Path | str, *, quantized: bool = False) -> None:
        self.folder = Path(folder)
        self.config = read_config(self.folder)
        if self.config.get("quantization_config") and not quantized:
            raise UserError(f"{self.folder} is quantized; expected bf16, fp16 or fp32 weights; use the original model")
        self._stored: dict[str, Stored] = {}
        for file, promised in weight_files(self.folder).items():
            found = _read_header(self.folder / file)
            lacking = sorted((promised or set()) - found.keys())
            if lacking:
                raise UserError(
                    f"{self.folder / file} lacks {lacking[0]}; expected it, says {INDEX}; download it again"
                )
            self._stored |= found if promised is None else {name: found[name] for name in promised}

    @cached_property
    def shape(self) -> Shape:
        from ..shape import Shape

        return Shape.from_config(self.config)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self._stored))

    def metadata(self, name: str) -> Stored:
        """dtype (safetensors name), shape, file and byte range of a tensor; UserError when there is none."""
        if name not in self._stored:
            raise UserError(f"{self.folder} holds no tensor {name}; expected it from config.json; check the checkpoint")
        return self._stored[name]

    def width(self, name: str) -> int:
        """Bytes per value of a tensor of weights; UserError for a type that is not plain floating point."""
        stored = self.metadata(name)
        if stored.dtype not in DTYPES:
            raise UserError(
                f"{name} is stored as {stored.dtype}; expected {', '.join(DTYPES)}; use unquantized weights"
            )
        return DTYPES[stored.dtype][1]

    def check(self) -> None:
        """Every tensor is known and there, as large as config.json says; told before gigabytes are read.

        Raises UserError for a family without a row, and for a tensor that is unknown, missing, quantized or of another
        size.
        """
        from .. import families

        for name in self.names:
            stored = self.metadata(name)
            if families.droppable(self.shape, name):
                if name == "lm_head.weight" and not self._same(name, "model.embed_tokens.weight"):
                    raise UserError(
                        f"{self.folder} says tie_word_embeddings but its lm_head differs from its embedding; "
                        "expected equal tensors; set tie_word_embeddings to false in config.json"
                    )
                continue
            expected = tuple(map(self.shape.size, families.axes_of(self.shape, name)))
            if stored.shape != expected:
                raise UserError(
                    f"{name} in {stored.path} has shape {stored.shape}; config.json says {expected}; "
                    "use the config.json that was saved with these weights"
                )
        for name, _ in families.tensors(self.shape):
            self.width(name)

    def _same(self, first: str, second: str) -> bool:
        """Whether two tensors are equal bit for bit, a chunk at a time."""
        one, two = self.metadata(first), self.metadata(second)
        if (one.dtype, one.shape) != (two.dtype, two.shape):
            return False
        step = max(1, CHUNK_BYTES * one.shape[0] // max(1, one.nbytes))
        starts = range(0, one.shape[0], step)
        ends = [min(start + step, one.shape[0]) for start in starts]
        return all(self.rows(first, a, b).equal(self.rows(second, a, b)) for a, b in zip(starts, ends, strict=True))

    def tensor(self, name: str) -> torch.Tensor:
        """The whole tensor, checked to be finite."""
        return self.rows(name, 0, self.metadata(name).shape[0])

    def rows(self, name: str, start: int, stop: int, *, buffer: bytearray | None = None) -> torch.Tensor:
        """Rows start:stop along the first axis, in the stored dtype, checked to be finite.

        With `buffer` (large enough) the result is a view into it, valid until its next use. Raises UserError
        naming the tensor that holds NaN or infinity, or the file that ends early.
        """
        import torch

        stored = self.metadata(name)
        row_values = prod(stored.shape[1:])
        row_bytes = row_values * self.width(name)
        size = (stop - start) * row_bytes
        buffer = bytearray(size) if buffer is None else buffer
        _read_into(memoryview(buffer)[:size], stored.path, stored.offset + start * row_bytes)
        dtype = getattr(torch, DTYPES[stored.dtype][0])
        values = torch.frombuffer(buffer, dtype=dtype, count=(stop - start) * row_values)
        check_finite(values, f"{name} in {stored.path}")
        return values.view(stop - start, *stored.shape[1:])

    def fingerprint(self) -> str:
        """16 hex digits that name these weights, the same for any sharding; reads about 20 MB of an 8B model.

        sha256 over the config (without its library version and path) and, for each tensor by name, its dtype,
        shape and 16 evenly spaced blocks of 4 KiB (small tensors whole). An edit between blocks goes unseen.
        """
        digest = hashlib.sha256()
        volatile = ("transformers_version", "_name_or_path")
        config = {key: value for key, value in self.config.items() if key not in volatile}
        digest.update(json.dumps(config, sort_keys=True).encode())
        block = memoryview(bytearray(SAMPLED_BLOCKS * BLOCK_BYTES))
        for name, (dtype, shape, path, offset, size) in sorted(self._stored.items()):
            digest.update(json.dumps([name, dtype, shape]).encode())
            if size <= len(block):
                spans = [(0, size)]
            else:
                last = size - BLOCK_BYTES
                spans = [(last * i // (SAMPLED_BLOCKS - 1), BLOCK_BYTES) for i in range(SAMPLED_BLOCKS)]
            for begin, length in spans:
                _read_into(block[:length], path, offset + begin)
                digest.update(block[:length])
        return digest.hexdigest()[:16]


def _read_header(path: Path) -> dict[str, Stored]:
    """The tensors of one safetensors file, with every byte range checked against the file's size."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
                raise UserError(_broken(path, f"{size} bytes, no complete header"))
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        found, end = {}, 0
        for name, entry in header.items():
            begin, stop = entry["data_offsets"]
            shape = tuple(entry["shape"])
            width = DTYPES[entry["dtype"]][1] if entry["dtype"] in DTYPES else OTHER_BYTES.get(entry["dtype"])
            if begin < 0 or (width is not None and stop - begin != prod(shape) * width):
                raise UserError(_broken(path, f"byte range of {name} does not fit its shape"))
            found[name] = Stored(entry["dtype"], shape, path, 8 + length + begin, stop - begin)
            end = max(end, stop)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; expected a readable file; check it") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(_broken(path, "its header is not valid JSON of the safetensors kind")) from error
    if size != 8 + length + end:
        raise UserError(_broken(path, f"{size} bytes where its header promises {8 + length + end}"))
    return found


def _read_into(view: memoryview, path: Path, offset: int) -> None:
    """Fill `view` from the file, with one UserError line when the file cannot be read or ends early."""
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            done = 0
            while done < len(view):
                count = file.readinto(view[done:])
                if not count:
                    raise UserError(_broken(path, f"it ends at byte {offset + done}"))
                done += count
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; expected a readable file; check the disk") from error


def check_finite(values: torch.Tensor, what: str) -> None:
    """Raise UserError, naming `what`, when any value is NaN or infinite."""
    import torch

    # a finite sum has only finite terms, and is the cheapest look at all of them; aminmax settles an overflow
    if not isfinite(values.sum().item()) and not all(isfinite(end.item()) for end in torch.aminmax(values)):
        raise UserError(f"{what} holds NaN or infinite weights; expected finite ones; download the model again")


def load_model(folder: Path | str, *, dtype: Any = None, device: Any = None) -> PreTrainedModel:
    """The model in eval mode (dtype None: as stored), after its files and weights were checked.

    Raises UserError for broken files, for tensors that are missing or of another size than config.json says, and for
    NaN or infinite weights (naming the tensor). No code that comes with a model is ever run. A folder that
    bitsandbytes quantized is loaded as it is.
    """
    import torch
    from transformers import AutoModelForCausalLM

    packed = (read_config(folder).get("quantization_config") or {}).get("quant_method") == "bitsandbytes"
    Checkpoint(folder, quantized=packed)  # one line for a broken file, where the loader would give a traceback
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype="auto" if dtype is None else dtype,
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are reported, and refused here in one line
        device_map={"": device or "cpu"} if packed else None,
    )
    model, info = loaded
    for what in ("missing_keys", "mismatched_keys"):
        if info[what]:
            name = sorted(str(key[0] if isinstance(key, tuple) else key) for key in info[what])[0]
            problem = "lacks" if what == "missing_keys" else "has another size for"
            raise UserError(
                f"{folder} {problem} {name}; expected every tensor that its config.json asks for; "
                "use the config.json that was saved with these weights"
            )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            check_finite(parameter, f"{name} in {folder}")
    return model.eval() if packed else model.to(device or "cpu").eval()


def skeleton(folder: Path | str) -> PreTrainedModel:
    """The model of a config.json without its weights, on torch's meta device."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def count_parameters(folder: Path | str) -> int:
    """Of a folder's model, by its config.json alone: from the table of families, else as transformers builds it."""
    from .. import families
    from ..shape import Shape

    config = read_config(folder)
    if config["model_type"] in families.FAMILIES:
        return Shape.from_config(config).parameters
    return skeleton(folder).num_parameters()


def load_gguf(folder: Path | str, file: str, *, device: Any = None) -> PreTrainedModel:
    """The model of a GGUF file, dequantized to float32, in eval mode. The sizes are those of config.json beside it.

    Raises UserError for a file that cannot be read.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

    try:
        config: Any = AutoConfig.from_pretrained(folder, local_files_only=True)  # the file does not state every key
        if config.model_type == "mistral":  # GGUF has one architecture for both
            config = LlamaConfig.from_dict(config.to_dict() | {"model_type": "llama"})
        with redirect_stderr(StringIO()):  # a bar of its own, terminal or not
            model: Any = AutoModelForCausalLM.from_pretrained(
                folder, gguf_file=file, config=config, dtype=torch.float32, local_files_only=True
            )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(
            f"cannot read {Path(folder) / file} ({_first_line(error)}); expected a GGUF file; export it again"
        ) from error
    return model.to(device or "cpu").eval()


def load_tokenizer(folder: Path | str) -> Any:
    """The tokenizer that lies beside the weights. Raises UserError when there is none that can be read."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"no usable tokenizer in {folder} ({_first_line(error)}); expected tokenizer.json beside the "
            "weights; copy the tokenizer's files there"
        ) from error


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; expected a readable file; check it") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); expected JSON; copy the file again") from error


def _broken(path: Path, why: str) -> str:
    return f"{path} is truncated or corrupt ({why}); expected a whole safetensors file; download it again"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
