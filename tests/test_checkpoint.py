"""Checkpoints: what a stock loader writes is read to the bit, and every broken file is one clear line."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import save_tiny, tiny_model, tiny_tokenizer
from safetensors.torch import load_file, save_file

from compressor.checkpoint import (
    Checkpoint,
    Described,
    copy_tokenizer,
    load_model,
    load_tokenizer,
    read_config,
    resolve,
    write_checkpoint,
)
from compressor.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "model")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    folder = tmp_path / "sharded"
    tiny_model().save_pretrained(folder, max_shard_size="60KB")
    tiny_tokenizer().save_pretrained(folder)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert text.count(";") == 2, "what happened; what was expected; how to fix it"
    return text


def test_rows_and_tensors_equal_the_library_s(folder: Path, sharded: Path) -> None:
    expected = load_file(folder / "model.safetensors")
    for where in (folder, sharded):
        checkpoint = Checkpoint(where)
        assert checkpoint.names == tuple(sorted(expected))
        for name, value in expected.items():
            assert checkpoint.metadata(name)[:2] == ("F32", tuple(value.shape))
            assert torch.equal(checkpoint.tensor(name), value)
            assert torch.equal(checkpoint.rows(name, 3, 11), value[3:11])
    assert (checkpoint.shape.hidden, checkpoint.shape.parameters) == (
        48,
        sum(v.numel() for v in expected.values()),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_stored_types_are_kept(folder: Path, dtype: torch.dtype) -> None:
    tensors = {name: value.to(dtype) for name, value in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    read = Checkpoint(folder).tensor("model.layers.1.mlp.up_proj.weight")
    assert read.dtype == dtype
    assert torch.equal(read, tensors["model.layers.1.mlp.up_proj.weight"])


def test_a_buffer_is_reused_and_may_be_larger(folder: Path) -> None:
    checkpoint, name, buffer = Checkpoint(folder), "model.norm.weight", bytearray(10_000)
    first = checkpoint.rows(name, 0, 8, buffer=buffer)
    copy = first.clone()
    second = checkpoint.rows(name, 8, 16, buffer=buffer)
    assert torch.equal(first, second)
    assert not torch.equal(copy, second)


@pytest.mark.parametrize("max_shard_bytes", [30_000, 10**9])
def test_written_checkpoints_load_with_stock_transformers(folder: Path, tmp_path: Path, max_shard_bytes: int) -> None:
    """Mixed dtypes too, one of odd length before a wider one: every tensor stays aligned."""
    source, out = Checkpoint(folder), tmp_path / "out"
    odd = torch.arange(5).to(torch.bfloat16)
    tensors = [Described("odd", "BF16", (5,), lambda: [odd[:2], odd[2:]])]
    for name in source.names:
        value = source.tensor(name)
        halves = [value[: len(value) // 2], value[len(value) // 2 :]]
        tensors.append(Described(name, "F32", tuple(value.shape), lambda halves=halves: halves))
    seen: list[int] = []
    write_checkpoint(out, tensors, config=source.config, max_shard_bytes=max_shard_bytes, progress=seen.append)
    assert sum(seen) == 4 * source.shape.parameters + 10
    files = list(out.glob("*.safetensors"))
    assert (len(files) == 1) == (max_shard_bytes == 10**9)
    biggest = max(source.metadata(name).nbytes for name in source.names)
    assert all(path.stat().st_size < max(max_shard_bytes, biggest) + 10_000 for path in files)
    for path in files:
        for name, value in load_file(path).items():
            assert torch.equal(value, odd if name == "odd" else source.tensor(name))
            stored = Checkpoint(out).metadata(name)
            assert stored.offset % value.element_size() == 0
    if len(files) > 1:
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(seen)
    assert not list(out.glob("*part*"))
    load_model(out)


def test_load_model_is_in_eval_mode_and_as_stored(sharded: Path) -> None:
    model = load_model(sharded)
    assert not model.training
    assert next(model.parameters()).dtype == torch.float32
    assert next(load_model(sharded, dtype=torch.bfloat16).parameters()).dtype == torch.bfloat16
    ids = torch.tensor([[5, 9, 30]])
    with torch.inference_mode():
        assert torch.equal(model(input_ids=ids).logits, tiny_model()(input_ids=ids).logits)


def test_fingerprint_is_of_the_weights_not_of_the_files(folder: Path, sharded: Path, tmp_path: Path) -> None:
    one = Checkpoint(folder).fingerprint()
    assert len(one) == 16
    assert Checkpoint(sharded).fingerprint() == one
    assert Checkpoint(save_tiny(tmp_path / "again")).fingerprint() == one
    assert Checkpoint(save_tiny(tmp_path / "other", seed=1)).fingerprint() != one
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_version": "9"}))
    assert Checkpoint(folder).fingerprint() == one
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    assert Checkpoint(folder).fingerprint() != one


def test_resolve_takes_folders_and_refuses_what_is_nowhere(folder: Path, monkeypatch) -> None:
    assert resolve(str(folder)) == folder
    assert read_config(str(folder))["hidden_size"] == 48
    for source in ("./nowhere", "/nowhere/at/all", "a/b/c", str(folder / "config.json")):
        with pytest.raises(UserError, match="is not a folder") as error:
            resolve(source)
        one_line(error)


@pytest.mark.parametrize("function", ["resolve", "read_config"])
def test_hub_failures_are_one_line(function: str) -> None:
    """Offline (set before huggingface_hub is imported, hence the child), and a name the Hub cannot have."""
    code = f"import sys; from compressor.checkpoint import {function}; {function}(sys.argv[1])"
    for source in ("someone/some-model", "not a name"):
        done = subprocess.run(
            [sys.executable, "-c", code, source],
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith(f"compressor.errors.UserError: cannot get {source} (")
        assert last.count(";") == 2


def test_no_network_is_told_at_once() -> None:
    code = "from compressor.checkpoint import read_config; read_config('someone/some-model')"
    online = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=online | {"HF_ENDPOINT": "https://nowhere.invalid", "no_proxy": "*"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "cannot get someone/some-model (no network, and not in the cache)" in done.stderr.strip().splitlines()[-1]
    assert "Retrying" not in done.stderr


def test_importing_is_light() -> None:
    """The command line reads configs without paying for torch."""
    code = "import sys, compressor.checkpoint; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_pickled_or_absent_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="holds no weights") as error:
        resolve(str(folder))
    one_line(error)
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(UserError, match="convert") as error:
        resolve(str(folder))
    one_line(error)


def first_shard(folder: Path) -> Path:
    return min(folder.glob("model-*.safetensors"))


def test_missing_shards_are_named(sharded: Path) -> None:
    shard = first_shard(sharded)
    shard.unlink()
    with pytest.raises(UserError, match="lacks 1 of") as error:
        Checkpoint(sharded)
    assert shard.name in one_line(error)


@pytest.mark.parametrize("keep", [0, 4, 60, -1, -5000])
def test_truncated_shards_are_named(sharded: Path, keep: int) -> None:
    """Cut in the length, in the header, and in the data: each before anything heavy is done."""
    shard = first_shard(sharded)
    data = shard.read_bytes()
    shard.write_bytes(data[:keep])
    for use in (Checkpoint, load_model):
        with pytest.raises(UserError, match="truncated or corrupt") as error:
            use(sharded)
        assert shard.name in one_line(error)


def corrupted(header: object) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(8)


HEADERS = {
    "not json": b"{{{{",
    "not utf-8": b"\xff\xfe\xfd",
    "a list": [1, 2],
    "no offsets": {"x": {"dtype": "F32", "shape": [2]}},
    "offsets": {"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}},
    "negative": {"x": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}},
    "short": {"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}},
}


@pytest.mark.parametrize("what", HEADERS)
def test_corrupt_headers_are_one_line(folder: Path, what: str) -> None:
    (folder / "model.safetensors").write_bytes(corrupted(HEADERS[what]))
    with pytest.raises(UserError, match="truncated or corrupt") as error:
        Checkpoint(folder)
    one_line(error)


def test_a_file_that_shrinks_while_it_is_read_is_named(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(UserError, match="truncated or corrupt") as error:
        checkpoint.tensor("model.norm.weight")
    one_line(error)


def test_unreadable_files_are_one_line(folder: Path) -> None:
    """A directory in the shard's place cannot be read even by root, unlike a file without permissions."""
    checkpoint = Checkpoint(folder)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    with pytest.raises(UserError, match="cannot read") as error:
        checkpoint.tensor("model.norm.weight")
    one_line(error)


def test_indexes_and_configs_that_make_no_sense(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    broken = {
        "not valid JSON": "{",
        "weight_map": "[]",
        "outside": json.dumps({"weight_map": {"x": "../x.safetensors"}}),
        "lacks ghost": json.dumps({"weight_map": good["weight_map"] | {"ghost": first_shard(sharded).name}}),
    }
    for message, text in broken.items():
        index.write_text(text)
        with pytest.raises(UserError, match=message) as error:
            Checkpoint(sharded)
        one_line(error)
    index.write_text(json.dumps(good))
    config = json.loads((sharded / "config.json").read_text())
    for message, text in {
        "quantized": json.dumps(config | {"quantization_config": {"bits": 4}}),
        "model_type": "{}",
        "not valid JSON": "{",
    }.items():
        (sharded / "config.json").write_text(text)
        with pytest.raises(UserError, match=message) as error:
            Checkpoint(sharded)
        one_line(error)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_bad_weight_is_found_and_named(folder: Path, value: float, dtype: torch.dtype) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(folder / "model.safetensors").items()}
    tensors["model.layers.1.mlp.up_proj.weight"][79, 47] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for use in (load_model, lambda where: Checkpoint(where).tensor("model.layers.1.mlp.up_proj.weight")):
        with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj\.weight in .*NaN") as error:
            use(folder)
        one_line(error)


def test_tokenizers_travel_and_absent_ones_are_one_line(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match="no usable tokenizer") as error:
        load_tokenizer(tmp_path / "bare")
    one_line(error)
    copy_tokenizer(folder, tmp_path / "bare")
    again = load_tokenizer(tmp_path / "bare")
    assert again.encode("travel") == load_tokenizer(folder).encode("travel")
    assert again.chat_template == tiny_tokenizer().chat_template


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large_finite_weights_are_not_taken_for_infinite(folder: Path, dtype: torch.dtype) -> None:
    """Their sum overflows the type, they do not."""
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(folder / "model.safetensors").items()}
    tensors["model.norm.weight"].fill_(torch.finfo(dtype).max)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(Checkpoint(folder).tensor("model.norm.weight"), tensors["model.norm.weight"])
