"""GGUF files: read and dequantised by transformers once, then kept as an ordinary checkpoint.

Reading takes minutes for a model of half a billion weights, so what came out is kept in a folder of this user's:
`$FOVEATE_CACHE`, or the system's place for caches. The folder is named after the file's place, size and time, so that
another file never finds it. Nothing is lost by deleting it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from foveate.bench.loading import files, weights
from foveate.bench.loading.refusal import quiet, reading, refused, several
from foveate.bench.loading.source import Source
from foveate.bench.loading.stretch import stretch
from foveate.bench.loading.trial import check_words

_LAYOUT = "1"  # changes when what is kept would be read differently


def read(
    source: Source, dtype: torch.dtype, where: torch.device, note: Callable[[str], None]
) -> tuple[PreTrainedModel, Any]:
    """The model and the tokenizer of a GGUF file, from the cache where they are there."""
    file = _local(source)
    _check_begin(source.name, file)
    kept = place(file, dtype)
    if (kept / "config.json").is_file():
        ready = Source(source.name, str(kept))
        files.check(source.name, kept)
        with reading(source.name, f"was kept in {kept}, which cannot be read"):
            config, tokenizer = AutoConfig.from_pretrained(kept), AutoTokenizer.from_pretrained(kept)
        return weights.read(ready, config, dtype, where, trust=False), tokenizer
    model, tokenizer = _convert(source.name, file, dtype, note)
    _keep(model, tokenizer, kept)
    return model.to(where), tokenizer


def place(file: Path, dtype: torch.dtype) -> Path:
    """Where the converted model of a GGUF file is kept."""
    told = file.stat()
    facts = (file.resolve(), told.st_size, told.st_mtime_ns, dtype, transformers.__version__, _LAYOUT)
    digest = hashlib.sha256("|".join(map(str, facts)).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return cache() / "gguf" / f"{file.stem}-{digest}"


def cache() -> Path:
    """This user's folder for what Foveate keeps between runs."""
    if named := os.environ.get("FOVEATE_CACHE"):
        return Path(named).expanduser()
    home = Path.home()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", home / "AppData" / "Local")) / "foveate"
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "foveate"
    return Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "foveate"


def _local(source: Source) -> Path:
    """The file on this machine; one of a hub is fetched."""
    assert source.gguf is not None
    if source.folder is not None:
        return source.folder / source.gguf
    with reading(source.name):
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(source.place, source.gguf))


def _check_begin(name: str, file: Path) -> None:
    """Refuse what is no GGUF file, a part of one, and a machine without the readers."""
    with file.open("rb") as opened:
        magic = opened.read(4)
    files.not_a_pointer(name, file)
    if magic != b"GGUF":
        raise refused(name, f"cannot be loaded: it does not begin as a GGUF file does ({magic!r})")
    if "-of-" in file.stem and file.stem.rpartition("-of-")[2].isdigit():
        raise refused(name, "is one part of several; join them with llama.cpp's `gguf-split --merge` first")
    try:
        import accelerate  # noqa: F401
        import gguf  # noqa: F401
    except ImportError:
        raise refused(name, "is a GGUF file; pip install 'foveate[gguf]' to read it") from None


def _convert(name: str, file: Path, dtype: torch.dtype, note: Callable[[str], None]) -> tuple[PreTrainedModel, Any]:
    where = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    note(f"reading {file.name}")
    with reading(name):
        config = AutoConfig.from_pretrained(**where)
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or getattr(config, "is_encoder_decoder", False):
        raise refused(name, f"is a {config.model_type}; compare needs a decoder language model")
    with reading(name, "has a tokenizer that cannot be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(**where)
    check_words(name, tokenizer)
    with reading(name):
        stretch(name, file, config)
    note(f"dequantising {file.name}, once")
    plain: dict[str, Any] = {"config": config, "dtype": dtype}
    if hasattr(transformers, "GgufConfig"):  # releases that have it keep the blocks packed unless told otherwise
        plain["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with reading(name), _silent_bar():
        model, info = AutoModelForCausalLM.from_pretrained(
            **where, **plain, output_loading_info=True, ignore_mismatched_sizes=True
        )
    weights.account(name, info)
    return _unmarked(name, model), tokenizer


def _unmarked(name: str, model: PreTrainedModel) -> PreTrainedModel:
    """The dequantised model without what says that it is quantised, which would keep it from being saved."""
    if packed := [key for key, tensor in model.named_parameters() if not tensor.is_floating_point()]:
        raise refused(name, f"cannot be loaded: {several(packed)} stayed packed")
    for owner, mark in ((model, "hf_quantizer"), (model, "quantization_method"), (model.config, "quantization_config")):
        if hasattr(owner, mark):
            delattr(owner, mark)
    model.is_quantized = False
    return model


@contextmanager
def _silent_bar() -> Iterator[None]:
    """Without the bar that transformers' reader of these files draws whatever its settings say."""
    import transformers.modeling_gguf_pytorch_utils as reader

    drawn = reader.tqdm
    reader.tqdm = lambda items, **_: items
    try:
        yield
    finally:
        reader.tqdm = drawn


def _keep(model: PreTrainedModel, tokenizer: Any, folder: Path) -> None:
    """Save the model for next time. Where there is no room or no permission, next time takes as long again."""
    draft = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(folder.parent).free < 2 * size:
            return
        with quiet():
            tokenizer.save_pretrained(draft)
            model.save_pretrained(draft)
        draft.replace(folder)
    except (OSError, SafetensorError):  # the disk is full, or another process was first
        return
    finally:
        shutil.rmtree(draft, ignore_errors=True)
