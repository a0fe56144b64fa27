"""Loading gives exactly the checkpoint's weights, in every form, or a one-line refusal."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import tests.corpus.everything  # noqa: F401  registers the cases
from foveate.bench.loading import find, gguf, load
from foveate.bench.loading.refusal import reading
from foveate.bench.loading.rope_scaling import apply_rope_scaling
from foveate.bench.loading.weights import unwrap_mapping
from foveate.core.errors import UnsupportedModel
from tests.corpus import adapters, gguf_files
from tests.corpus.cases import CASES, copied, sound, tiny

IDS = torch.tensor([[256, 72, 101, 108, 108, 111, 32, 49]])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sound(tmp_path_factory.mktemp("loading") / "sound")


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model.eval()(IDS).logits


def loaded(name: str, base: Path, folder: Path) -> PreTrainedModel:
    """Load the model of a case of the corpus."""
    made = CASES[name].make(base, folder)
    return load(made[made.index("--model") + 1])[0]


@pytest.mark.parametrize(
    "name",
    [
        "plain", "shards", "compiled_names", "parallel_names", "parallel_and_compiled_names", "compiled_layers_names",
        "sharded_compiled_names", "old_buffers",
    ],
)  # fmt: skip
def test_every_form_gives_the_same_model(name: str, base: Path, tmp_path: Path) -> None:
    assert torch.equal(logits(loaded(name, base, tmp_path)), logits(tiny()))


@pytest.mark.parametrize("name", ["adapter_alone", "adapter_with_a_relative_base", "adapter_beside_the_model"])
def test_an_adapter_adds_its_product_to_the_weights(name: str, base: Path, tmp_path: Path) -> None:
    found = loaded(name, base, tmp_path)
    stored = load_file(next(tmp_path.rglob(adapters.WEIGHTS)))
    expected = tiny()
    for name_, low in stored.items():
        if "lora_A" in name_:
            module = expected.get_submodule(name_.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
            module.weight.data += 8 / 2 * stored[name_.replace("lora_A", "lora_B")] @ low  # lora_alpha / r
    assert torch.allclose(logits(found), logits(expected), atol=1e-5)
    assert not torch.allclose(logits(found), logits(tiny()), atol=1e-2)
    assert not any("lora" in name for name, _ in found.named_parameters())


def test_an_adapter_without_peft_names_what_to_install(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters.adapter(tmp_path / "adapter", base)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UnsupportedModel, match=r"LORA adapter; pip install 'foveate\[lora\]'"):
        load(str(tmp_path / "adapter"))


@pytest.fixture
def gguf_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Any]:
    """Write a GGUF file; return it with its model."""
    monkeypatch.setenv("FOVEATE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "tiny.gguf", gguf_files.write(tmp_path / "tiny.gguf")


def test_a_gguf_file_is_converted_once(
    gguf_file: tuple[Path, Any], tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    file, made = gguf_file
    notes: list[str] = []
    first, tokenizer, folder = load(str(file), note=notes.append)
    assert torch.allclose(logits(first), logits(made), atol=1e-5) and folder is None and len(notes) == 2
    again, same, _ = load(str(file), note=notes.append)
    assert torch.equal(logits(again), logits(first)) and len(notes) == 2
    text = "The key: 12, ünï 模型\n"
    assert same(text).input_ids == tokenizer(text).input_ids == [256, *text.encode()]
    assert len(list((tmp_path / "cache" / "gguf").iterdir())) == 1
    assert capfd.readouterr() == ("", "")


SCALINGS = {
    "linear": ({"rope_type": "linear", "factor": 4.0}, {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}),
    "yarn": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 512},
    ),
    "llama3": (
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 8192},
        {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", SCALINGS)
def test_a_gguf_file_keeps_its_rope_scaling(kind: str, tmp_path: Path) -> None:
    rope, fields = SCALINGS[kind]
    rope = {**rope, "rope_theta": 1e6}
    factors = {}
    if kind == "llama3":
        config = tiny(rope_parameters=dict(rope)).config
        plain = 1e6 ** -(torch.arange(4) / 4)
        factors["rope_freqs.weight"] = plain / ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))[0]
    fields = {"rope.freq_base": 1e6, **fields}
    made = gguf_files.write(tmp_path / "a.gguf", told=fields, tensors=factors, rope_parameters=rope)
    config = AutoConfig.from_pretrained(tmp_path, gguf_file="a.gguf")
    assert config.rope_parameters["rope_type"] == "default"  # transformers ignores the scaling
    apply_rope_scaling("a", tmp_path / "a.gguf", config)
    assert {name: config.rope_parameters[name] for name in rope} == pytest.approx(rope)
    found = gguf._convert("a", tmp_path / "a.gguf", torch.float32, lambda text: None)[0]
    assert torch.allclose(logits(found), logits(made), atol=1e-5)
    plain = tiny(rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    assert not torch.allclose(logits(found), logits(plain), atol=1e-4)


def test_a_changed_gguf_file_is_converted_again(gguf_file: tuple[Path, Any]) -> None:
    file, _ = gguf_file
    load(str(file))
    other = gguf_files.write(file, num_hidden_layers=1)
    assert torch.allclose(logits(load(str(file))[0]), logits(other), atol=1e-5)


def test_a_gguf_cache_that_cannot_be_written_is_harmless(
    gguf_file: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, made = gguf_file
    (tmp_path / "taken").write_text("a file")
    monkeypatch.setenv("FOVEATE_CACHE", str(tmp_path / "taken"))
    for _ in range(2):
        assert torch.allclose(logits(load(str(file))[0]), logits(made), atol=1e-5)


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_gguf_names_what_to_install(gguf_file: tuple[Path, Any], package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UnsupportedModel, match=r"pip install 'foveate\[gguf\]'"):
        load(str(gguf_file[0]))


def test_the_cache_is_in_the_users_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("FOVEATE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    assert gguf.cache() == tmp_path / "foveate"


def test_code_runs_only_with_permission(base: Path, tmp_path: Path) -> None:
    made = CASES["code_of_its_own_that_may_run"].make(base, tmp_path)
    where = made[made.index("--model") + 1]
    with pytest.raises(UnsupportedModel, match="--trust-remote-code"):
        load(where)
    assert not (tmp_path / "ran").exists()
    own, _, _ = load(where, trust_remote_code=True)
    assert (tmp_path / "ran").exists() and type(own).__name__ == "OwnModel"
    assert torch.equal(logits(own), logits(tiny()))


def test_loading_never_asks_on_the_terminal(base: Path, tmp_path: Path) -> None:
    """The command does not read a `y` from its input."""
    made = CASES["code_of_its_own"].make(base, tmp_path)
    found = subprocess.run(
        [sys.executable, "-m", "foveate", "compare", *made, "--out", str(tmp_path / "out")],
        check=False, capture_output=True, text=True, input="y\ny\n",
    )  # fmt: skip
    assert found.returncode == 2 and not (tmp_path / "ran").exists()
    assert [line[:6] for line in found.stderr.splitlines() if line.strip()] == ["error:"], found.stderr


def test_refusals_name_a_few_tensors_and_count_the_rest(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"model\.layers\.2\.[\w.]+, .*, .* and 6 more$"):
        loaded("config_has_a_layer_more", base, tmp_path)


def test_only_prefixes_of_all_names_are_removed() -> None:
    assert unwrap_mapping(["module.a", "module.b"]) == {r"^module\.": ""}
    assert unwrap_mapping(["module.a", "b"]) is None
    assert unwrap_mapping(["a._orig_mod.b", "c"]) == {r"(^|\.)_orig_mod\.": r"\1"}


def test_a_source_lists_its_files(base: Path, tmp_path: Path) -> None:
    adapter = adapters.adapter(tmp_path / "adapter", base)
    names = {file.relative_to(file.parents[1]).as_posix() for file in find(str(adapter)).files}
    assert {"sound/model.safetensors", "sound/config.json", "adapter/adapter_model.safetensors"} <= names
    gguf_files.write(tmp_path / "tiny.gguf")
    assert find(str(tmp_path / "tiny.gguf")).files == [tmp_path / "tiny.gguf"]
    assert find("somebody/model").files == [] and find("somebody/model").folder is None
    assert find("somebody/model/deep/q4.gguf").gguf == "deep/q4.gguf"


@pytest.mark.parametrize("name", ["./a", "~/a", "a/b/c", "C:\\models\\a", "/a", "a.gguf"])
def test_paths_are_never_looked_up_on_a_hub(name: str) -> None:
    with pytest.raises(UnsupportedModel, match="is no folder and no GGUF file"):
        find(name)


def test_a_home_folder_is_found(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    copied(base, tmp_path)
    assert find("~/model").folder == tmp_path / "model"


def test_panics_become_refusals_and_interrupts_do_not() -> None:
    panic = type("PanicException", (BaseException,), {})
    with (
        pytest.raises(UnsupportedModel, match="model='m' cannot be loaded: PanicException: at the disco"),
        reading("m"),
    ):
        raise panic("at the disco\nbacktrace")
    with pytest.raises(KeyboardInterrupt), reading("m"):
        raise KeyboardInterrupt
