"""GGUF files, dequantised by transformers once and then cached as an ordinary checkpoint.

Dequantising half a billion weights takes minutes, so the result is cached in `$FOVEATE_CACHE` or in the system's cache
folder. The name of the cached folder depends on the file's path, size and modification time, so that a changed file is
converted again. The cache may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import os
import shutil
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
from foveate.bench.loading.rope_scaling import apply_rope_scaling
from foveate.bench.loading.source import Source
from foveate.bench.loading.trial import check_words
from foveate.core.cache_folder import cache

_LAYOUT = "1"  # change it when older cached folders must not be read


def read(
    source: Source, dtype: torch.dtype, device: torch.device, note: Callable[[str], None]
) -> tuple[PreTrainedModel, Any]:
    """Return the model and the tokenizer of a GGUF file, from the cache if possible."""
    file = _local(source)
    _check_begin(source.name, file)
    folder = cached_folder(file, dtype)
    if (folder / "config.json").is_file():
        cached = Source(source.name, str(folder))
        files.check(source.name, folder)
        with reading(source.name, f"was cached in {folder}, which cannot be read"):
            config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        return weights.read(cached, config, dtype, device, trust=False), tokenizer
    model, tokenizer = _convert(source.name, file, dtype, note)
    _save(model, tokenizer, folder)
    return model.to(device), tokenizer


def cached_folder(file: Path, dtype: torch.dtype) -> Path:
    """Return the folder for the converted model of a GGUF file."""
    stat = file.stat()
    facts = (file.resolve(), stat.st_size, stat.st_mtime_ns, dtype, transformers.__version__, _LAYOUT)
    digest = hashlib.sha256("|".join(map(str, facts)).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return cache() / "gguf" / f"{file.stem}-{digest}"


def _local(source: Source) -> Path:
    """Return the local file; a file on a hub is downloaded."""
    assert source.gguf is not None
    if source.folder is not None:
        return source.folder / source.gguf
    with reading(source.name):
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(source.location, source.gguf))


def _check_begin(name: str, file: Path) -> None:
    """Refuse other files, a part of a split file, and an environment without the reader packages."""
    with file.open("rb") as opened:
        magic = opened.read(4)
    files.refuse_pointer(name, file)
    if magic != b"GGUF":
        raise refused(name, f"cannot be loaded: it does not begin as a GGUF file does; got {magic!r}")
    if "-of-" in file.stem and file.stem.rpartition("-of-")[2].isdigit():
        raise refused(name, "is one part of several; join them with llama.cpp's `gguf-split --merge` first")
    try:
        import accelerate  # noqa: F401
        import gguf  # noqa: F401
    except ImportError:
        raise refused(name, "is a GGUF file; pip install 'foveate[gguf]' to read it") from None


def _convert(name: str, file: Path, dtype: torch.dtype, note: Callable[[str], None]) -> tuple[PreTrainedModel, Any]:
    origin = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    note(f"reading {file.name}")
    with reading(name):
        config = AutoConfig.from_pretrained(**origin)
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or getattr(config, "is_encoder_decoder", False):
        raise refused(name, f"is a {config.model_type}; it must be a decoder language model")
    with reading(name, "has a tokenizer that cannot be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(**origin)
    check_words(name, tokenizer)
    with reading(name):
        apply_rope_scaling(name, file, config)
    note(f"dequantising {file.name}, once")
    options: dict[str, Any] = {"config": config, "dtype": dtype}
    if hasattr(transformers, "GgufConfig"):  # these releases keep the blocks packed by default
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with reading(name), _silent_bar():
        model, info = AutoModelForCausalLM.from_pretrained(
            **origin, **options, output_loading_info=True, ignore_mismatched_sizes=True
        )
    weights.check_report(name, info)
    return _unmark(name, model), tokenizer


def _unmark(name: str, model: PreTrainedModel) -> PreTrainedModel:
    """Remove the attributes that mark the model as quantised, with which it cannot be saved."""
    if packed := [key for key, tensor in model.named_parameters() if not tensor.is_floating_point()]:
        raise refused(name, f"cannot be loaded: {several(packed)} stayed packed")
    for owner, mark in ((model, "hf_quantizer"), (model, "quantization_method"), (model.config, "quantization_config")):
        if hasattr(owner, mark):
            delattr(owner, mark)
    model.is_quantized = False
    return model


@contextmanager
def _silent_bar() -> Iterator[None]:
    """Suppress the progress bar of transformers' GGUF reader, which ignores the library's settings."""
    import transformers.modeling_gguf_pytorch_utils as reader

    original = reader.tqdm
    reader.tqdm = lambda items, **_: items
    try:
        yield
    finally:
        reader.tqdm = original


def _save(model: PreTrainedModel, tokenizer: Any, folder: Path) -> None:
    """Cache the model. Without space or permission nothing is cached, and the next run converts again."""
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
