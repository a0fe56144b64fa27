"""Methods of one's own in a comparison."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor

from foveate.bench import compare
from foveate.core.errors import OptionError
from foveate.host import Site
from foveate.kv import KNorm, ScorePolicy


class ValueNorm(ScorePolicy):
    def score(self, site: Site) -> Tensor:
        return site.v.norm(dim=-1)


def test_objects_run_beside_keys(tmp_path: Path) -> None:
    found = compare(
        task="needle", examples=2, length=300, out=tmp_path,
        methods=["knorm", ValueNorm(share=0.35), ValueNorm(share=0.2), KNorm(share=0.35)],
    )  # fmt: skip
    rows = {row.method: row for row in found.rows}
    assert list(rows) == ["full", "knorm", "ValueNorm", "ValueNorm 2", "KNorm"]
    assert not any(row.error for row in found.rows)
    assert rows["ValueNorm"].cache_kept > 1.3 * rows["ValueNorm 2"].cache_kept
    assert rows["ValueNorm"].options["share"] == 0.35
    assert sorted(path.stem for path in (tmp_path / "recipes").iterdir()) == ["full", "knorm-0.35"]


def test_a_changed_object_is_measured_again(tmp_path: Path) -> None:
    outputs = []
    for share in (0.9, 0.1, 0.9):
        found = compare(task="needle", examples=1, length=300, out=tmp_path, methods=[ValueNorm(share=share)])
        outputs.append(found.rows[1].cache_kept)
    assert outputs[0] == outputs[2] > outputs[1]


@pytest.mark.parametrize("methods", ["snapkv", [KNorm], [1], KNorm(share=0.5)])
def test_what_is_no_list_of_methods_is_refused(methods: object, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="methods must be a list of keys") as caught:
        compare(task="needle", examples=1, out=tmp_path / "out", methods=methods)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
