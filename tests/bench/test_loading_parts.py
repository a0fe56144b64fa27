"""Parts of loading: devices, the files of weights, the beginning of a GGUF file, and messages in one line."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from foveate.bench.loading import files, gguf, trained_on, weights
from foveate.bench.loading.device import torch_device
from foveate.bench.loading.refusal import first_line, reading, refused, several
from foveate.core.errors import OptionError, UnsupportedModel
from foveate.train.loop import checkpoint

# -- devices -----------------------------------------------------------------------------------------------------------


def test_a_device_that_does_not_work_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    assert torch_device("cpu") == torch.device("cpu")
    with pytest.raises(OptionError, match=r"^device='abacus' is not usable here: Expected one of"):
        torch_device("abacus")
    with pytest.raises(OptionError, match="device='meta' must hold data"):
        torch_device("meta")
    for kind in (RuntimeError, AssertionError, NotImplementedError):  # torch raises each of them, by build and device

        def broken(*args: object, kind: type[Exception] = kind, **options: object) -> None:
            raise kind("no driver\nlong explanation")

        monkeypatch.setattr(torch, "empty", broken)
        with pytest.raises(OptionError) as caught:
            torch_device("cpu")
        assert str(caught.value) == "device='cpu' is not usable here: no driver"


# -- files of weights --------------------------------------------------------------------------------------------------


def folder(tmp_path: Path, *names: str, index: object = None) -> Path:
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    if index is not None:
        (tmp_path / files.INDEX).write_text(json.dumps(index))
    return tmp_path


def shards(where: Path) -> list[str]:
    return [path.name for path in files.shards("m", where)]


def test_an_adapter_is_no_shard_of_its_model(tmp_path: Path) -> None:
    assert shards(folder(tmp_path, "adapter_model.safetensors")) == []
    assert shards(folder(tmp_path, "weights.safetensors")) == ["weights.safetensors"]
    assert shards(folder(tmp_path, "model.safetensors", "model-1.safetensors")) == ["model.safetensors"]


def test_shards_without_an_index_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="model-1.safetensors need a"):
        shards(folder(tmp_path, "model-1.safetensors"))


def test_an_index_names_files_of_the_folder(tmp_path: Path) -> None:
    both = {"weight_map": {"a": "two.safetensors", "b": "one.safetensors", "c": "two.safetensors"}}
    assert shards(folder(tmp_path, "one.safetensors", "two.safetensors", index=both)) == [
        "one.safetensors", "two.safetensors",
    ]  # fmt: skip
    for outside in ("../one.safetensors", "/one.safetensors", "part/one.safetensors"):
        with pytest.raises(UnsupportedModel, match="points out of the folder, to"):
            shards(folder(tmp_path, index={"weight_map": {"a": outside}}))
    with pytest.raises(UnsupportedModel, match="names three.safetensors, which the folder lacks"):
        shards(folder(tmp_path, index={"weight_map": {"a": "three.safetensors"}}))
    for wrong in ({}, {"weight_map": {}}, {"weight_map": ["a"]}, {"weight_map": {"a": 1}}):
        with pytest.raises(UnsupportedModel, match="must hold a weight_map"):
            shards(folder(tmp_path, index=wrong))


REPORT: dict[str, Any] = {"mismatched_keys": [], "missing_keys": [], "unexpected_keys": []}


@pytest.mark.parametrize(
    ("report", "message"),
    [
        ({"mismatched_keys": [("b", [3], [4])]}, r"b is \(3,\) in the file and \(4,\) by config.json$"),
        (
            {"mismatched_keys": [("b", [3], [4]), ("a", [2], [5]), ("c", [3], [4])]},
            r"a is \(2,\) in the file and \(5,\) by config.json, and 2 more tensors differ$",
        ),
        ({"error_msgs": ["  bad\nworse"]}, "cannot be loaded: bad$"),
        ({"missing_keys": ["b", "a"]}, "lacks weights that its config.json asks for: a, b$"),
        ({"unexpected_keys": ["b", "x.rotary_emb.inv_freq"]}, "has no place for: b$"),
    ],
)
def test_tensors_that_do_not_fit_are_named(report: dict[str, Any], message: str) -> None:
    weights.check_report("m", {**REPORT, "unexpected_keys": ["h.0.attn.bias", "position_ids"]})
    with pytest.raises(UnsupportedModel, match=message):
        weights.check_report("m", {**REPORT, **report})


@pytest.mark.parametrize("quantised", [None, "gptq"])
def test_weights_go_to_the_device_and_packed_ones_load_there(
    quantised: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[dict[str, Any]] = []
    moved: list[torch.device] = []

    def from_pretrained(source: object, config: object, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        given.append(options)
        return SimpleNamespace(to=moved.append), REPORT

    monkeypatch.setattr(weights, "_from_pretrained", from_pretrained)
    config = SimpleNamespace(quantization_config=quantised and {"quant_method": quantised})
    source, device = SimpleNamespace(folder=None, name="m"), torch.device("meta")
    weights.read(source, config, torch.float16, device, trust=False)  # type: ignore[arg-type]
    assert moved == ([device] if quantised is None else [])
    assert given[0].get("device_map") == (None if quantised is None else {"": device})
    assert given[0]["dtype"] == torch.float16 and given[0]["use_safetensors"] and given[0]["key_mapping"] is None


# -- GGUF --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("begin", [b"GGU0", b"GGUG", b"ggml", b"", b"\xff\xff\xff\xff"])
def test_a_file_that_does_not_begin_as_gguf_is_refused(begin: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(begin)
    with pytest.raises(UnsupportedModel, match="does not begin as a GGUF file does"):
        gguf._check_begin("a", tmp_path / "a.gguf")


def test_a_part_of_a_gguf_file_is_refused(tmp_path: Path) -> None:
    for name in ("a-00001-of-00002.gguf", "a-of-2.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
        with pytest.raises(UnsupportedModel, match="is one part of several"):
            gguf._check_begin("a", tmp_path / name)
    (tmp_path / "out-of-office.gguf").write_bytes(b"GGUF")
    gguf._check_begin("a", tmp_path / "out-of-office.gguf")


def test_the_cache_lies_where_the_system_keeps_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FOVEATE_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    places = {"linux": ".cache/foveate", "darwin": "Library/Caches/foveate", "win32": "AppData/Local/foveate"}
    for platform, place in places.items():
        monkeypatch.setattr("sys.platform", platform)
        assert gguf.cache() == tmp_path / place
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert gguf.cache() == tmp_path / "xdg" / "foveate"
    monkeypatch.setenv("FOVEATE_CACHE", str(tmp_path / "own"))
    assert gguf.cache() == tmp_path / "own"


# -- messages ----------------------------------------------------------------------------------------------------------


def test_a_message_is_one_line_of_bounded_length() -> None:
    assert first_line(ValueError("\n  first \nsecond")) == "first"
    assert first_line(KeyError("a")) == "KeyError: 'a'"
    assert first_line(ValueError("  \n")) == "ValueError"
    assert first_line(ValueError("x" * 240)) == "x" * 240
    assert first_line(ValueError("x" * 241)) == "x" * 240 + "..."
    assert "--trust-remote-code allows" in first_line(ValueError("pass trust_remote_code=True"))
    assert str(refused("m" * 240, "is odd")) == f"model='{'m' * 240}' is odd"
    assert str(refused("m" * 241, "is odd")) == f"model='{'m' * 240}...' is odd"


@pytest.mark.parametrize(
    ("names", "text"), [([], ""), (["b", "a"], "a, b"), (list("cab"), "a, b, c"), (list("edcba"), "a, b, c and 2 more")]
)
def test_a_few_names_and_the_number_of_the_others(names: list[str], text: str) -> None:
    assert several(names) == text


def test_errors_of_reading_become_one_line_and_ours_pass() -> None:
    with pytest.raises(UnsupportedModel, match=r"^model='m' cannot be loaded: KeyError: 'a'$"), reading("m"):
        raise KeyError("a")
    for kind in (OptionError, MemoryError, KeyboardInterrupt):
        with pytest.raises(kind), reading("m"):
            raise kind("own")


# -- what a folder was trained on --------------------------------------------------------------------------------------


def test_only_a_folder_has_the_task_of_a_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []
    monkeypatch.setattr(checkpoint, "task_of", asked.append)
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "config.json").write_text("{}")
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    assert trained_on(None) is None and trained_on(str(tmp_path / "a.gguf")) is None
    assert asked == []
    assert trained_on(str(tmp_path / "net")) is None
    assert asked == [tmp_path / "net"]


@pytest.mark.parametrize("kind", [OSError, ValueError, KeyError, TypeError, AttributeError])
def test_a_damaged_record_of_a_training_is_refused(
    kind: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(where: Path) -> None:
        raise kind("bad")

    monkeypatch.setattr(checkpoint, "task_of", broken)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UnsupportedModel, match=f"cannot be read .{kind.__name__}: "):
        trained_on(str(tmp_path))
