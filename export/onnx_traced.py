"""The ONNX graph of an architecture without a row in `families`: traced by transformers.exporters, then made ours.

One graph reads prompts and decodes (`multi_token_decode`), its inputs and outputs carry the names that
onnxruntime-genai and transformers.js feed, and its weights the names of the parameters that they hold, found by their
values: the exporter transposes some and packs others side by side. It takes one sequence at a time, the price of
GroupQueryAttention there. Suffixes: N output channels, K input channels, T positions.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.errors import UserError
from compressor.runtime import stop_ids

from .onnx_graph import logits_in_float32, orientation
from .settings import layer_parts

if TYPE_CHECKING:
    import onnx_ir
    import torch

JOIN = "+"  # between the names of parameters that lie side by side in one initializer
PROBE_TOKENS, PADDING = 12, 3  # without padding in the sample the exporter drops attention_mask
CACHE = re.compile(r"(input|output)\.past_key_values\.layers\.(\d+)\.(key|value)s")
CACHE_NAMES = {"input": "past_key_values.{}.{}", "output": "present.{}.{}"}


def trace(student: Path, *, half: bool = False) -> tuple[onnx_ir.Model, dict[str, Any]]:
    """The graph of a Hugging Face folder in float32, or in float16 with `half`, and its genai_config.

    Raises UserError for an architecture that transformers.exporters cannot trace.
    """
    import torch
    from transformers import DynamicCache
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter
    from transformers.exporters.utils import decompose_for_generation

    from compressor.checkpoint import load_model, load_tokenizer, read_config

    try:
        with _silent():
            model: Any = load_model(student, dtype=torch.float16 if half else torch.float32, device="cpu")
            _check_plain(model)
            ids_1T = torch.arange(PROBE_TOKENS).unsqueeze(0) % model.config.vocab_size
            mask_1T = (torch.arange(PROBE_TOKENS) >= PADDING).long().unsqueeze(0)
            sample = {"input_ids": ids_1T, "attention_mask": mask_1T}
            stages: Any = decompose_for_generation(model, sample, multi_token_decode=True)
            decoder, inputs = stages["decode"]
            # a sliding window's own cache has a counter among its inputs, which no runtime feeds; masks do without
            layers = [(layer.keys, layer.values) for layer in inputs["past_key_values"].layers]
            inputs["past_key_values"] = DynamicCache(layers)
            traced, _ = OnnxExporter().export_program(decoder, inputs, OnnxConfig(dynamic=True, ort_fusions="cpu"))
        genai = _genai_config(model, traced.graph, load_tokenizer(student))
    except UserError:
        raise
    except Exception as error:  # what a tracer raises shares no base class
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"transformers.exporters cannot trace this {read_config(student)['model_type']} model ({why}); expected a "
            "decoder of plain attention layers; export another model"
        ) from error
    _rename(traced.graph)
    parameters = dict(model.named_parameters())
    _name_weights(traced.graph, {name: found.oriented(parameters[name]) for name, found in matrices_of(model).items()})
    if half:
        _norms_in_one_type(traced.graph)
        logits_in_float32(traced.graph)
    return traced, genai


def _check_plain(model: Any) -> None:
    """Raise UserError for what would stay unrounded and unchecked, such as experts: one tensor of three axes."""
    deep = next((name for name, parameter in model.named_parameters() if parameter.dim() > 2), None)
    if deep is not None:
        raise UserError(
            f"{deep} has more than two axes; expected linear layers, no experts or convolutions; export another model"
        )
    if not getattr(model.config, "max_position_embeddings", None):
        raise UserError("config.json names no max_position_embeddings; expected a longest context; add it")


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep off the user's screen what a tracer says of its progress and of every fixed dimension."""
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


@dataclass(frozen=True)
class Matrix:
    """A parameter that multiplies or is looked up, N x K.

    parts: head, first, last, as `Settings.bits_of` asks. rounds: False for a table of positions, which no
    format rounds. turned: the module stores it (K, N).
    """

    rows: int
    columns: int
    parts: frozenset[str]
    rounds: bool
    turned: bool

    def oriented(self, parameter: torch.Tensor) -> torch.Tensor:
        """(N, K), whatever the module stores."""
        return parameter.detach().T if self.turned else parameter.detach()


def matrices_of(model: Any) -> dict[str, Matrix]:
    """Parameter name -> its matrix, of a model that may have no weights; a shared parameter comes once."""
    from torch.nn import Embedding, Linear
    from transformers.pytorch_utils import Conv1D

    modules = dict(model.named_modules())
    head, tokens = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    found = {}
    for name, parameter in model.named_parameters():
        module = modules[name.rpartition(".")[0]]
        if parameter.dim() != 2 or not isinstance(module, Linear | Embedding | Conv1D):
            continue
        turned = isinstance(module, Conv1D)
        rows, columns = reversed(parameter.shape) if turned else parameter.shape
        parts = {"head"} if parameter is head else layer_parts(name, model.config.num_hidden_layers)
        found[name] = Matrix(
            rows, columns, frozenset(parts), not isinstance(module, Embedding) or parameter is tokens, turned
        )
    return found


def _rename(graph: Any) -> None:
    """Inputs and outputs as the runtimes name them, and their free lengths."""
    import onnx_ir as ir

    for value in (*graph.inputs, *graph.outputs):
        sizes = [int(text) if text.isdigit() else text for text in map(str, value.shape)]  # some numbers come as names
        found = CACHE.fullmatch(str(value.name))
        if found:
            value.name = CACHE_NAMES[found[1]].format(found[2], found[3])
            sizes[2] = "past_sequence_length" if found[1] == "input" else "total_sequence_length"
        else:
            sizes[1] = "total_sequence_length" if value.name == "attention_mask" else "sequence_length"
        value.shape = ir.Shape(sizes)


def _norms_in_one_type(graph: Any) -> None:
    """Gemma weighs its norms in float32, which onnxruntime's fused norm of float16 values does not take: cast them."""
    import onnx_ir as ir

    for node in list(graph):
        if node.op_type == "SkipSimplifiedLayerNormalization" and node.inputs[2].dtype != node.inputs[0].dtype:
            cast = ir.node("Cast", [node.inputs[2]], {"to": node.inputs[0].dtype}, name=f"{node.name}/weight")
            cast.outputs[0].shape, cast.outputs[0].dtype = node.inputs[2].shape, node.inputs[0].dtype
            graph.insert_before(node, cast)
            node.replace_input_with(2, cast.outputs[0])
            node.outputs[0].dtype = node.inputs[0].dtype


def _name_weights(graph: Any, known: dict[str, torch.Tensor]) -> None:
    """Give each weight the name of its parameter, or the names of those it holds side by side.

    Raises UserError for a matrix that is none of them: nobody could say what it should be.
    """
    import torch

    starts: dict[bytes, list[str]] = {}
    used: set[str] = set()  # two parameters may be equal
    for name, matrix_NK in known.items():
        starts.setdefault(matrix_NK[0].contiguous().numpy().tobytes(), []).append(name)
    for value in list(graph.initializers.values()):
        oriented = orientation(value)
        if len(value.shape) != 2 or oriented is None:
            continue
        matrix_NK = torch.from_numpy(value.const_value.numpy())
        if not oriented:
            matrix_NK = matrix_NK.T
        names, row = [], 0
        while row < len(matrix_NK):
            first = matrix_NK[row].contiguous().numpy().tobytes()
            for name in starts.get(first, ()):
                rows = len(known[name])
                if name not in used and matrix_NK[row : row + rows].equal(known[name]):
                    names.append(name)
                    used.add(name)
                    row += rows
                    break
            else:
                raise UserError(
                    f"the traced graph multiplies by a matrix ({value.name}, row {row}) that is no parameter of the "
                    "model; expected plain linear layers; export another model"
                )
        graph.initializers.pop(value.name)
        value.name = JOIN.join(names)
        graph.initializers.add(value)


def _genai_config(model: Any, graph: Any, tokenizer: Any) -> dict[str, Any]:
    """What onnxruntime-genai needs to know of a graph. The cache is handed on, not written in place."""
    config, generation = model.config, model.generation_config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    inputs = {name: name for name in ("input_ids", "attention_mask", "position_ids") if name in _names(graph.inputs)}
    configured = generation.eos_token_id if generation.eos_token_id is not None else config.eos_token_id
    stops = sorted(stop_ids(configured, tokenizer))
    first = generation.bos_token_id if generation.bos_token_id is not None else config.bos_token_id
    return {
        "model": {
            "type": "decoder",
            "vocab_size": config.vocab_size,
            "context_length": config.max_position_embeddings,
            "bos_token_id": first if first is not None else (stops or [0])[0],
            "eos_token_id": stops,
            "pad_token_id": generation.pad_token_id if generation.pad_token_id is not None else (stops or [0])[0],
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": "model.onnx",
                "head_size": head_dim,
                "hidden_size": config.hidden_size,
                "num_attention_heads": config.num_attention_heads,
                "num_key_value_heads": getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
                "num_hidden_layers": config.num_hidden_layers,
                "inputs": inputs
                | {
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {"max_length": config.max_position_embeddings, "past_present_share_buffer": False},
    }


def _names(values: Any) -> set[str]:
    return {str(value.name) for value in values}
