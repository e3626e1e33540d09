"""The ONNX graph: built by onnxruntime-genai's builder in float32, then halved, rounded and written by passes of ours.

The builder's own int8 leaves a float32 table behind for a tied embedding; here one packed table serves both lm_head
(MatMulNBits) and embedding (Gather and a few standard nodes), at 4 and at 8 bits. Weights are evaluated one at a time
and go straight to the data file, so that memory holds the student as stored and a few copies of one matrix.
Suffixes: N output channels, K input channels, V vocabulary, H hidden size, G blocks of a row.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.errors import UserError

from .rounding import ASYMMETRIC, Blocks, round_blocks

if TYPE_CHECKING:
    import onnx_ir

MICROSOFT = "com.microsoft"
ALIGNMENT = 64  # of a tensor in the data file; a page where it is large, so that it can be mapped
PAGE_BYTES, LARGE_BYTES = 4096, 2**20
INT8_ACTIVATIONS = 4  # MatMulNBits' accuracy_level: the CPU kernels multiply int8 by int4 or int8


class DataFile:
    """The external data of a graph, written tensor by tensor."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("wb")

    def add(self, name: str, values: Any) -> onnx_ir.Value:
        """An initializer whose bytes now lie in the file."""
        import numpy
        import onnx_ir as ir

        array = numpy.ascontiguousarray(values)
        alignment = PAGE_BYTES if array.nbytes >= LARGE_BYTES else ALIGNMENT
        offset = -(-self._file.tell() // alignment) * alignment
        self._file.seek(offset)
        self._file.write(array.data)
        dtype = ir.DataType.from_numpy(array.dtype)
        shape = ir.Shape(array.shape)
        stored = ir.ExternalTensor(
            self.path.name, offset, array.nbytes, dtype, shape=shape, name=name, base_dir=self.path.parent
        )
        return ir.Value(name=name, shape=shape, type=ir.TensorType(dtype), const_value=stored)

    def __enter__(self) -> DataFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def build(student: Path, *, half: bool = False) -> tuple[onnx_ir.Model, dict[str, Any]]:
    """The graph of a Hugging Face folder, its weights not yet evaluated, and its genai_config.

    In float32; with `half` in float16, the KV cache included, but for the logits. Raises UserError for an architecture
    that the builder does not know.
    """
    from unittest.mock import patch

    import onnx_ir as ir
    from onnxruntime_genai.models import builder

    graphs: list[onnx_ir.Model] = []

    def keep(self: Any, folder: str) -> None:
        graphs.append(self.model)

    with tempfile.TemporaryDirectory() as work:
        where = ("", str(student), work, "fp32", "cpu", str(Path(work) / "cache"))
        # the builder would write all weights in float32, for us to read them back
        with patch.object(builder.Model, "save_model", keep), contextlib.redirect_stdout(io.StringIO()):  # pyright: ignore
            try:
                builder.create_model(*where, **builder.parse_extra_options(*where, []))
            except (NotImplementedError, ValueError) as error:
                raise UserError(
                    f"onnxruntime-genai's builder refuses this model ({error}); expected a stock architecture "
                    "with its rope and end token; check config.json, or export to gguf"
                ) from error
        genai = json.loads((Path(work) / "genai_config.json").read_text(encoding="utf-8"))
    graph: Any = graphs[0].graph
    _embed_from_rows(graph)
    for value in (*graph.inputs, *graph.outputs):
        if str(value.name).startswith(("past_key_values.", "present.")):
            # the builder leaves a name there, which transformers.js takes for a length of 0
            value.shape = ir.Shape([*value.shape[:3], genai["model"]["decoder"]["head_size"]])
    if half:
        _halve(graph)
    return graphs[0], genai


def write(
    model: onnx_ir.Model,
    path: Path,
    *,
    bits: Callable[[str], int | None],
    block: int,
    algorithm: str = "rtn",
    rounded: Callable[[str], Blocks | None] = lambda name: None,
    data_name: str,
    progress: Callable[[int], object] | None = None,
) -> None:
    """Write a graph to `path`, its weights to `data_name` beside it.

    bits: initializer name -> 4 or 8 to round it, None to keep it as it is; rounded: one of 4 bits -> its
    blocks where they are known already. `progress` is told weights, not bytes.
    """
    import onnx_ir as ir

    graph: Any = model.graph
    with DataFile(path.with_name(data_name)) as data:
        for name, value in list(graph.initializers.items()):
            width = bits(name)
            if not value.dtype.is_floating_point() or value.const_value.size == 1:
                continue  # shapes and scalars stay in the graph, where its shapes are inferred from them
            if width is None:
                fresh = data.add(name, value.const_value.numpy())
                graph.initializers.pop(name)
                value.replace_all_uses_with(fresh)
                graph.initializers.add(fresh)
            else:
                known = rounded(name) if width == 4 else None
                _round(graph, value, data, known, bits=width, block=block, algorithm=algorithm)
            if progress is not None:
                progress(value.const_value.size)
    graph.sort()
    ir.save(model, path)


def _embed_from_rows(graph: Any) -> None:
    """Read a tied embedding through the head's table itself, without the builder's Transpose of it before Gather."""
    import onnx_ir as ir

    for node in list(graph):
        if node.op_type == "Transpose" and node.inputs[0].is_initializer():
            table, gather = node.inputs[0], node.outputs[0].consumers()[0]
            # the table is (H, V): rows of the transposed table are its columns
            columns = ir.node("Gather", [table, gather.inputs[1]], {"axis": 1}, name=gather.name)
            hidden = ir.node("Transpose", [columns.outputs[0]], {"perm": [1, 2, 0]}, name=node.name)
            columns.outputs[0].dtype = gather.outputs[0].dtype
            _replace(graph, gather, [columns, hidden])
            graph.remove(node, safe=True)


def hugging_face_names(name: str, *, tied: bool) -> list[str]:
    """The parameters that an initializer of the builder's holds, side by side where there are several.

    A parameter's own name stays what it is.
    """
    layer = re.fullmatch(r"(model\.layers\.\d+\.)(.+)", name)
    if layer is None:
        return [{"lm_head.MatMul.weight": "model.embed_tokens.weight" if tied else "lm_head.weight"}.get(name, name)]
    prefix, rest = layer.groups()
    if rest.startswith("final_norm"):
        return ["model.norm.weight"]
    rest = re.sub(r"\.(MatMul|Add|layernorm)\.", ".", re.sub(r"^attn\.", "self_attn.", rest))
    if ".qkv_proj." in rest:
        return [prefix + rest.replace("qkv_proj", f"{letter}_proj") for letter in "qkv"]
    return [prefix + rest]


def rows_are_outputs(node: Any, weight: Any) -> bool | None:
    """Whether a matrix lies (out, in) in the product or look-up that reads it, else (in, out).

    None where the node does something else with it.
    """
    attributes = {name: value.value for name, value in node.attributes.items()}
    if node.op_type == "Gather" and node.inputs[0] is weight:
        return attributes.get("axis", 0) == 0
    if node.op_type in ("MatMul", "FusedMatMul", "Gemm") and node.inputs[1] is weight:
        return bool(attributes.get("transB", 0))
    return None


def orientation(weight: Any) -> bool | None:
    """`rows_are_outputs` of the nodes that multiply by a matrix or look it up; None where there is none."""
    found = (rows_are_outputs(node, weight) for node in weight.consumers())
    return next((rows for rows in found if rows is not None), None)


def _replace(graph: onnx_ir.Graph, old: onnx_ir.Node, new: list[onnx_ir.Node]) -> None:
    """Put `new` in the place of `old`; the last one's output takes over its name, type, shape and readers."""
    import onnx_ir as ir

    output = new[-1].outputs[0]
    output.shape, output.type = old.outputs[0].shape, old.outputs[0].type
    ir.convenience.replace_nodes_and_values(graph, old, [old], new, [old.outputs[0]], [output])


def _round(
    graph: Any,
    value: Any,
    data: DataFile,
    blocks: Blocks | None,
    *,
    bits: int,
    block: int,
    algorithm: str,
) -> None:
    """Replace one weight by its blocks, and each node that reads it by the one that reads blocks."""
    import torch

    name = str(value.name)
    readers = list(value.consumers())
    table = any(node.op_type == "Gather" for node in readers)
    weight = torch.from_numpy(value.const_value.numpy())
    if not orientation(value):
        weight = weight.T
    block = fitting_block(block, weight.shape[1])
    if table and algorithm in ASYMMETRIC:  # one table serves lm_head and embedding, which knows no zero points
        algorithm = "search"
    if blocks is None:
        blocks = round_blocks(weight, bits=bits, block=block, algorithm=algorithm)
    inputs = [data.add(f"{name}_q{bits}", blocks.packed().numpy())]
    inputs.append(data.add(f"{name}_scales", blocks.scale_NG.to(weight.dtype).numpy()))
    if blocks.zero_NG is not None:
        inputs.append(data.add(f"{name}_zero_points", _packed_rows(blocks)))
    for initializer in inputs:
        graph.initializers.add(initializer)
    N, K = weight.shape
    sizes = {"bits": bits, "block_size": block}
    for node in readers:
        if node.op_type == "Gather":
            _gather(graph, node, inputs, sizes, hidden=K)
        else:
            _multiply(graph, node, inputs, {"K": K, "N": N, **sizes, "accuracy_level": INT8_ACTIVATIONS})
    graph.initializers.pop(name)


def _multiply(graph: Any, node: Any, inputs: list[Any], attributes: dict[str, int]) -> None:
    """The product from packed rows; what FusedMatMul and Gemm do beside it becomes a node of its own."""
    import numpy
    import onnx_ir as ir

    name = node.name
    new = [ir.node("MatMulNBits", [node.inputs[0], *inputs], attributes, domain=MICROSOFT, name=name)]
    scale = node.attributes["alpha"].as_float() if "alpha" in node.attributes else 1.0
    if scale != 1.0:
        factor = ir.Value(name=f"{name}/alpha", const_value=ir.tensor(numpy.array(scale, inputs[1].dtype.numpy())))
        graph.initializers.add(factor)
        new.append(ir.node("Mul", [new[-1].outputs[0], factor], name=f"{name}/scaled"))
    if len(node.inputs) > 2:
        new.append(ir.node("Add", [new[-1].outputs[0], node.inputs[2]], name=f"{name}/biased"))
    _replace(graph, node, new)


def _gather(graph: Any, node: Any, inputs: list[Any], sizes: dict[str, int], *, hidden: int) -> None:
    """The embedding from packed rows: a token's blocks (.., G, B) unpacked, laid end to end, cut to the hidden size.

    GatherBlockQuantized would do it in one node, but onnxruntime's builds for browsers have no CPU kernel for it.
    """
    import numpy
    import onnx_ir as ir

    new: list[onnx_ir.Node] = []

    def constant(name: str, values: Any, dtype: Any = numpy.int64) -> onnx_ir.Value:
        value = ir.Value(name=f"{node.name}/{name}", const_value=ir.tensor(numpy.array(values, dtype)))
        graph.initializers.add(value)
        return value

    def add(kind: str, name: str, values: list[Any], **attributes: Any) -> onnx_ir.Value:
        new.append(ir.node(kind, values, attributes, name=f"{node.name}/{name}"))
        return new[-1].outputs[0]

    packed, scales = inputs
    ids, end = node.inputs[1], constant("end", [-1])
    rows = add("Gather", "rows", [packed, ids], axis=0)
    if sizes["bits"] == 4:  # the earlier value of a byte is its low half
        low = add("BitwiseAnd", "low", [rows, constant("fifteen", 15, numpy.uint8)])
        high = add("BitShift", "high", [rows, constant("four", 4, numpy.uint8)], direction="RIGHT")
        columns = [add("Unsqueeze", f"{name}_column", [half, end]) for name, half in (("low", low), ("high", high))]
        pairs = add("Concat", "pairs", columns, axis=-1)
        rows = add("Reshape", "unpacked", [pairs, constant("blocks", [0, 0, 0, -1])])
    middle = constant("middle", 2 ** (sizes["bits"] - 1), scales.dtype.numpy())
    centred = add("Sub", "centred", [add("Cast", "cast", [rows], to=scales.dtype), middle])
    factors = add("Unsqueeze", "factors", [add("Gather", "scales", [scales, ids], axis=0), end])
    joined = add("Reshape", "joined", [add("Mul", "values", [centred, factors]), constant("shape", [0, 0, -1])])
    if hidden % sizes["block_size"]:
        ends = [constant(name, [value]) for name, value in (("start", 0), ("stop", hidden), ("axis", 2))]
        add("Slice", "cut", [joined, *ends])
    # a tied table was read by columns until now, and turned round after
    last = node if rows_are_outputs(node, node.inputs[0]) else node.outputs[0].consumers()[0]
    _replace(graph, last, new)
    if last is not node:
        graph.remove(node, safe=True)


def fitting_block(block: int, size: int) -> int:
    """The largest power of two up to `block` that divides `size`, but 16 at least: the last block is filled up then."""
    while block > 16 and size % block:
        block //= 2
    return block


def _packed_rows(blocks: Blocks) -> Any:
    """Zero points (N, G) as MatMulNBits wants them: two 4-bit values a byte, an odd row filled up."""
    import torch

    zero_NG = blocks.zero_NG
    assert zero_NG is not None
    if blocks.bits == 4:
        zero_NG = torch.nn.functional.pad(zero_NG, (0, zero_NG.shape[1] % 2))
        zero_NG = zero_NG[:, 0::2] | (zero_NG[:, 1::2] << 4)
    return zero_NG.contiguous().numpy()


def _halve(graph: Any) -> None:
    """Make every float32 value of the graph float16, but for the logits."""
    import numpy
    import onnx_ir as ir

    def half_of(values: Any) -> Any:
        return lambda: ir.Tensor(values.numpy().astype(numpy.float16))

    for value in graph.initializers.values():
        if value.dtype == ir.DataType.FLOAT:
            tensor = value.const_value
            value.const_value = ir.LazyTensor(half_of(tensor), dtype=ir.DataType.FLOAT16, shape=tensor.shape)
            value.dtype = ir.DataType.FLOAT16
    for node in graph:
        for attribute in node.attributes.values():
            if attribute.name == "to" and attribute.as_int() == ir.DataType.FLOAT:
                node.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT16)
        for value in node.outputs:
            if value.dtype == ir.DataType.FLOAT:
                value.dtype = ir.DataType.FLOAT16
    for value in (*graph.inputs, *graph.outputs):
        if value.dtype == ir.DataType.FLOAT:
            value.dtype = ir.DataType.FLOAT16
    logits_in_float32(graph)


def logits_in_float32(graph: Any) -> None:
    """Hand the logits of a float16 graph out in float32."""
    import onnx_ir as ir

    logits = next(value for value in graph.outputs if value.name == "logits")
    cast = ir.node("Cast", [logits], {"to": ir.DataType.FLOAT}, name="/lm_head/Cast")
    cast.outputs[0].shape, cast.outputs[0].dtype = logits.shape, ir.DataType.FLOAT
    graph.append(cast)
    logits.name, cast.outputs[0].name = "logits_half", "logits"
    graph.outputs[list(graph.outputs).index(logits)] = cast.outputs[0]
