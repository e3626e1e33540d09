"""The formats as rows of a table: how each is written, read back, opened and measured. Adding one adds a row."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from compressor.checkpoint import DTYPES, Checkpoint, load_tokenizer, read_config, skeleton
from compressor.errors import CheckFailed
from compressor.families import FAMILIES
from compressor.runtime import LlamaCppRuntime, OnnxRuntime, TorchRuntime, open_gguf
from compressor.shape import Shape

from . import gguf_tokenizer, read_back, to_bitsandbytes, to_gguf, to_onnx
from .onnx_traced import matrices_of
from .rounding import MOVED
from .settings import Settings

if TYPE_CHECKING:
    from compressor.runtime import Runtime

    from .read_back import Read

Encode = Callable[[str], list[int]]
Forward = Callable[..., Any]
# What the RMS difference of logits may be, over their standard deviation, to torch in float32 on the same weights:
# float32 arithmetic, 16-bit arithmetic or cache, activations rounded to int8
EXACT, HALF, COARSE = 1e-3, 2e-2, 0.2


class Model(NamedTuple):
    """One set of weights: its tensors, and runtimes beside `Format.open` that must run it, each with its tolerance.

    A runtime is a function like `Runtime.cached_logits`, made when it is called for. required: the parameters that
    must be among the tensors, None for all; what is left out is held by logits alone.
    """

    name: str
    weights: Iterator[Read]
    runtimes: Mapping[str, tuple[Callable[[], Forward], float]]
    required: Collection[str] | None = None


@dataclass(frozen=True)
class Format:
    """One row.

    write(student, folder, settings, progress=..., and what it `asks` for of about and calibration); check: raises
    UserError for a checkpoint that the format cannot hold, before anything is written; models: the weight files of a
    folder, the one that `open` runs last; sizes: file -> (bytes of weights stored, bytes that arithmetic expects);
    tolerance: of the logits of `open`, by precision; own_tokenizers: text -> ids of runtimes that do not read
    tokenizer.json as transformers does, and what to do where they differ (None: the artifact is still right, and
    tells); check_metadata: says what was found, and raises CheckFailed where sizes, rope or tokens kept in the file
    itself are others; notes: what a user should know of the artifact.
    """

    write: Callable[..., None]
    models: Callable[[Path, Path, Settings], Iterator[Model]]
    open: Callable[[Path], Runtime]
    sizes: Callable[[Path, Path, Settings], Mapping[str, tuple[int, int]]]
    tolerance: Callable[[str], float]
    asks: tuple[str, ...] = ()
    check: Callable[[Checkpoint], None] = Checkpoint.check
    own_tokenizers: Callable[[Path, Settings], dict[str, tuple[Encode, str | None]]] = lambda folder, settings: {}
    check_metadata: Callable[[Path, Path], str | None] = lambda student, folder: None
    notes: Callable[[Path, Settings], list[str]] = lambda student, settings: []


# --- onnx -----------------------------------------------------------------------------------------------------------


def _check_known(checkpoint: Checkpoint) -> None:
    """Tensor by tensor for a family of the table; tracing knows others, and loads them itself."""
    if checkpoint.config["model_type"] in FAMILIES:
        checkpoint.check()


def _onnx_tolerance(precision: str) -> float:
    return {"fp32": EXACT, "fp16": HALF}.get(precision, COARSE)


def _plain(graph: Path, *, exact: bool = False) -> Forward:
    from .plain_onnx import PlainOnnx

    return PlainOnnx(graph, exact=exact).cached_logits


def _onnx_models(student: Path, folder: Path, settings: Settings) -> Iterator[Model]:
    model = skeleton(student) if to_onnx.is_traced(student) else None
    moved = MOVED if settings.algorithm == "gptq" else 0
    for precision, path in reversed(to_onnx.graphs(settings).items()):
        graph = folder / path
        runtimes = {"onnxruntime": (partial(_plain, graph), _onnx_tolerance(precision))}
        if _onnx_tolerance(precision) == COARSE:  # held to its arithmetic too, without the rounding of activations
            exact = HALF if precision == "q4f16" else EXACT
            runtimes["onnxruntime, activations in float32"] = (partial(_plain, graph, exact=True), exact)
        if model is None:
            shape = Shape.from_config(read_config(student))
            yield Model(path, read_back.onnx_weights(graph, shape, moved=moved), runtimes)
        else:
            weights = read_back.traced_weights(graph, model, moved=moved)
            yield Model(path, weights, runtimes, required=matrices_of(model))


def _onnx_sizes(student: Path, folder: Path, settings: Settings) -> dict[str, tuple[int, int]]:
    return {
        path: (
            to_onnx.data_name(folder / path).stat().st_size + _embedded(folder / path),
            to_onnx.arithmetic_bytes(student, settings, precision),
        )
        for precision, path in to_onnx.graphs(settings).items()
    }


def _embedded(graph: Path) -> int:
    """Bytes of weights inside the graph's own file, where none belong; constants of a node or two are below 1 KiB."""
    import onnx_ir

    values = [value.const_value for value in onnx_ir.load(graph).graph.initializers.values()]
    inside = [value for value in values if value is not None and not isinstance(value, onnx_ir.ExternalTensor)]
    return sum(value.nbytes for value in inside if value.nbytes > 1024)


def _gguf_notes(student: Path, settings: Settings) -> list[str]:
    """Matrices that k-quants cannot hold; a rule that was given, that nothing here could hold to the model's tokens."""
    notes = []
    fallen = to_gguf.fallen_back(Shape.from_config(read_config(student)), settings.precision)
    if fallen:
        notes.append(
            f"{len(fallen)} matrices have an older type, {fallen[0]} first: their rows are no multiples of 256, which "
            "k-quants ask for"
        )
    pre = settings.tokenizer_pre
    if pre is not None and pre not in gguf_tokenizer.PRE and not find_spec("llama_cpp"):
        notes.append(f"--tokenizer-pre {pre} was taken at its word: only llama.cpp knows how it splits text")
    return notes


def _genai_tokenizer(folder: Path, settings: Settings) -> dict[str, tuple[Encode, str | None]]:
    genai: Any = import_module("onnxruntime_genai")
    tokenizer = genai.Tokenizer(genai.Model(str(folder)))
    return {"onnxruntime-genai": (lambda text: [int(token) for token in tokenizer.encode(text)], None)}


# --- gguf -----------------------------------------------------------------------------------------------------------


def _gguf_models(student: Path, folder: Path, settings: Settings) -> Iterator[Model]:
    shape = Shape.from_config(read_config(student))
    tolerance = HALF if settings.precision in to_gguf.VALUE_BYTES else COARSE  # its KV cache is float16
    runtimes = (
        {"llama.cpp": (lambda: LlamaCppRuntime(folder).cached_logits, tolerance)} if find_spec("llama_cpp") else {}
    )
    yield Model(to_gguf.FILE, read_back.gguf_weights(folder / to_gguf.FILE, shape), runtimes)


def _gguf_sizes(student: Path, folder: Path, settings: Settings) -> dict[str, tuple[int, int]]:
    import gguf

    path = folder / to_gguf.FILE
    stored = path.stat().st_size - gguf.GGUFReader(path).data_offset
    return {to_gguf.FILE: (stored, to_gguf.arithmetic_bytes(read_config(student), settings))}


def gguf_fields(folder: Path) -> dict[str, Any]:
    """The tokenizer.* metadata of the file in a GGUF folder."""
    import gguf

    fields = gguf.GGUFReader(folder / to_gguf.FILE).fields
    return {key: field.contents() for key, field in fields.items() if key.startswith("tokenizer.")}


def _gguf_tokenizer(folder: Path, settings: Settings) -> dict[str, tuple[Encode, str | None]]:
    fields = gguf_fields(folder)
    if fields.get("tokenizer.ggml.pre", "llama-bpe") not in gguf_tokenizer.PRE and not find_spec("llama_cpp"):
        return {}  # a rule that was given and that only llama.cpp itself knows
    tokenizer = None if find_spec("llama_cpp") else gguf_tokenizer.rebuilt(fields)
    advice = None  # a rule that was given is taken at its word, and SentencePiece has none
    if settings.tokenizer_pre is None and "tokenizer.ggml.pre" in fields:
        advice = (
            f"no rule of llama.cpp's gives this model's tokens, {fields['tokenizer.ggml.pre']} comes nearest; name it "
            "with --tokenizer-pre and feed token ids, or export to onnx"
        )
    normalizer = load_tokenizer(folder).backend_tokenizer.normalizer

    # llama.cpp itself where it is there, else what it would make of the file
    own = LlamaCppRuntime(folder).tokenize if tokenizer is None else None

    def encode(text: str) -> list[int]:
        return own(text) if own else tokenizer.encode(text, add_special_tokens=False).ids  # pyright: ignore

    if normalizer is None or fields["tokenizer.ggml.model"] == "llama":
        return {"llama.cpp": (encode, advice)}
    # llama.cpp normalizes nothing, as all of Qwen's files have to live with: its rule is held to normalized text
    rule = (lambda text: encode(normalizer.normalize_str(text)), advice)
    return {"llama.cpp on normalized text": rule, "llama.cpp": (encode, None)}


def _check_gguf_metadata(student: Path, folder: Path) -> str:
    """Sizes, rope and tokens are the student's: transformers takes them from config.json, llama.cpp from the file."""
    import gguf
    from transformers import AutoConfig

    config: Any = AutoConfig.from_pretrained(student, local_files_only=True)
    reader = gguf.GGUFReader(folder / to_gguf.FILE)
    name = reader.fields["general.architecture"].contents()
    for key, wanted in _expected_metadata(config).items():
        field = reader.fields.get(f"{name}.{key}")
        value = field.contents() if field else None
        if value is None or abs(value - wanted) > 1e-6 * abs(wanted):  # floats are stored in 32 bits
            raise CheckFailed(f"{name}.{key} of the GGUF file is {value}, and {wanted} in the student")
    _check_rope(config, {tensor.name: tensor.data for tensor in reader.tensors}.get("rope_freqs.weight"))
    _check_gguf_tokens(student, folder)
    return "sizes, rope and every token are the student's"


def _expected_metadata(config: Any) -> dict[str, float]:
    """What transformers makes of the student's config.json, under GGUF's names."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters
    linear = {"rope.scaling.factor": rope["factor"]} if rope.get("rope_type") == "linear" else {}
    return linear | {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.dimension_count": head_dim,
        "rope.freq_base": rope["rope_theta"],
        "vocab_size": config.vocab_size,
    }


def _check_rope(config: Any, factors: Any) -> None:
    """The file's frequencies, base and factors together, are those that the student turns its channels by."""
    import numpy
    from transformers import AutoModelForCausalLM

    if config.rope_parameters.get("rope_type", "default") == "linear":
        return  # a factor of its own, beside the base
    tiny = {"num_hidden_layers": 1, "layer_types": None, "vocab_size": 8, "pad_token_id": None, "intermediate_size": 8}
    small = type(config).from_dict(config.to_dict() | tiny)
    wanted = AutoModelForCausalLM.from_config(small).base_model.rotary_emb.inv_freq.numpy()
    plain = config.rope_parameters["rope_theta"] ** -(numpy.arange(len(wanted)) / len(wanted))
    found = plain if factors is None else plain / factors
    if not numpy.allclose(found, wanted, rtol=1e-4):
        raise CheckFailed(f"the GGUF file turns channels by {found[:4]} ..., the student by {wanted[:4]} ...")


def _check_gguf_tokens(student: Path, folder: Path) -> None:
    """Every id has the text that the student's tokenizer has for it, and every key its value."""
    found = gguf_fields(folder)
    tokens = found["tokenizer.ggml.tokens"]
    known = {i: text for text, i in load_tokenizer(student).get_vocab().items()}
    for i, text in enumerate(tokens):
        if known.get(i, f"[PAD{i}]") != text:
            raise CheckFailed(f"token {i} is {known.get(i)!a} in the student and {text!a} in the GGUF file")
    wanted = gguf_tokenizer.tokenizer_fields(student, len(tokens), pre=found.get("tokenizer.ggml.pre"))
    for key, value in wanted.items():
        if found.get(key) != value:
            raise CheckFailed(f"{key} of the GGUF file is not the student's")


# --- bitsandbytes ---------------------------------------------------------------------------------------------------


def _bitsandbytes_models(student: Path, folder: Path, settings: Settings) -> Iterator[Model]:
    shape = Shape.from_config(read_config(student))
    yield Model("model.safetensors", read_back.bitsandbytes_weights(folder, shape), {})


def _bitsandbytes_sizes(student: Path, folder: Path, settings: Settings) -> dict[str, tuple[int, int]]:
    checkpoint = Checkpoint(student)
    stored = Checkpoint(folder, quantized=True)
    total = sum(stored.metadata(name).nbytes for name in stored.names)
    value_bytes = DTYPES[checkpoint.metadata("model.embed_tokens.weight").dtype][1]
    expected = to_bitsandbytes.arithmetic_bytes(checkpoint.config, settings, value_bytes=value_bytes)
    return {"model.safetensors": (total, expected)}


def _kept_whole(student: Path, settings: Settings) -> list[str]:
    kept = to_bitsandbytes.refused(Shape.from_config(read_config(student)), settings.precision)
    if not kept:
        return []
    return [f"{len(kept)} matrices stay as they are, {kept[0]} first: CPU kernels refuse their sizes in nf4"]


FORMATS: dict[str, Format] = {
    "onnx": Format(
        write=to_onnx.write_onnx,
        asks=("calibration",),
        check=_check_known,
        models=_onnx_models,
        open=OnnxRuntime,
        sizes=_onnx_sizes,
        tolerance=_onnx_tolerance,
        own_tokenizers=_genai_tokenizer,
    ),
    "gguf": Format(
        write=to_gguf.write_gguf,
        asks=("about",),
        models=_gguf_models,
        open=partial(open_gguf, engine="transformers"),
        sizes=_gguf_sizes,
        tolerance=lambda precision: EXACT,
        own_tokenizers=_gguf_tokenizer,
        check_metadata=_check_gguf_metadata,
        notes=_gguf_notes,
    ),
    "bitsandbytes": Format(
        write=to_bitsandbytes.write_bitsandbytes,
        models=_bitsandbytes_models,
        open=TorchRuntime,
        sizes=_bitsandbytes_sizes,
        notes=_kept_whole,
        tolerance=lambda precision: COARSE,
    ),
}
