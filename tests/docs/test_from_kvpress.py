"""The page for users of kvpress: it names every press, and what it says is here is here."""

from __future__ import annotations

import re
from pathlib import Path

import foveate
import foveate.kv

PAGE = (Path(__file__).parents[2] / "docs" / "from-kvpress.md").read_text()
#: The public names of kvpress 0.5.5.
PRESSES = """
CriticalAdaKVPress CriticalKVPress CURPress AdaKVPress BasePress ComposedPress ScorerPress ExpectedAttentionPress
KnormPress ObservedAttentionPress RandomPress RestoreKVPress SimLayerKVPress SnapKVPress StreamingLLMPress ThinKPress
TOVAPress KVPressTextGenerationPipeline PerLayerCompressionPress KeyRerotationPress ChunkPress DuoAttentionPress
ChunkKVPress QFilterPress PyramidKVPress FinchPress LagKVPress BlockPress KeyDiffPress KVgradPress KVzipPress
ExpectedAttentionStatsPress CAMPress DecodingPress CompressionRatioDecodingPress PrefillDecodingPress CompactorPress
LeverageScorePress NonCausalAttnPress KVzapPress DMSPress FastKVzipPress KVComposePress MergingPress CapPress
LUKVPress EntropyGatedChunkKVPress
""".split()


def rows() -> list[tuple[str, str]]:
    found = re.findall(r"^\| (`.*?) \| (.*?) \|$", PAGE, re.MULTILINE)
    assert len(found) > 30
    return found


def test_every_name_of_kvpress_has_its_row() -> None:
    named = {name for theirs, _ in rows() for name in re.findall(r"\b\w+(?:Press|Pipeline)\b", theirs)}
    assert named == set(PRESSES)


def test_what_it_names_is_here() -> None:
    for _, ours in rows():
        for name in re.findall(r"`(?:foveate\.(?:kv\.)?)?([A-Z]\w+)", ours.split("not here")[0]):
            assert hasattr(foveate.kv, name) or hasattr(foveate, name), name
