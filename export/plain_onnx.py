"""A graph run by plain onnxruntime, the KV cache handed from step to step as a browser or an app would."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.errors import UserError

if TYPE_CHECKING:
    import torch

KINDS = {"tensor(float)": "float32", "tensor(float16)": "float16"}


class PlainOnnx:
    """One decoder graph with inputs input_ids, attention_mask, past_key_values.* and outputs logits, present.*.

    exact: multiply packed weights by activations in float32, which the graph as it stands rounds to int8.
    Raises UserError for a file that onnxruntime cannot open.
    """

    def __init__(self, graph: Path, *, exact: bool = False) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(graph.parent))
        try:
            source = _in_float32(graph) if exact else graph
            self._session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's errors share no base class
            why = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"onnxruntime cannot open {graph} ({why}); expected a decoder graph; export again"
            ) from error

    def cached_logits(self, ids: torch.Tensor, *, prefill: int) -> torch.Tensor:
        """Token ids (T,) -> logits (T, V): `prefill` tokens at once, the others one by one from the cache."""
        import numpy
        import torch

        inputs = {value.name: value for value in self._session.get_inputs()}
        past: dict[str, Any] = {
            name: numpy.zeros((1, value.shape[1], 0, value.shape[3]), KINDS[value.type])
            for name, value in inputs.items()
            if name.startswith("past_key_values.")
        }
        names = [value.name for value in self._session.get_outputs()]
        found, done = [], 0
        for part in (ids[:prefill], *ids[prefill:].split(1)) if prefill < len(ids) else (ids,):
            done += len(part)
            feeds = {"input_ids": part.numpy()[None], "attention_mask": numpy.ones((1, done), numpy.int64)}
            if "position_ids" in inputs:  # a traced graph asks for them
                feeds["position_ids"] = numpy.arange(done - len(part), done)[None]
            outputs: dict[str, Any] = dict(zip(names, self._session.run(None, feeds | past), strict=True))
            past = {name: outputs[name.replace("past_key_values", "present")] for name in past}
            found.append(torch.from_numpy(outputs["logits"][0]))
        return torch.cat(found)


def _in_float32(graph: Path) -> bytes:
    """The graph, its weights still in their file, with float32 activations asked of every packed product."""
    import onnx_ir as ir

    model = ir.load(graph)
    for node in model.graph:
        if node.op_type == "MatMulNBits":
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 1)
    return ir.to_proto(model).SerializeToString()
