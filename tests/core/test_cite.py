"""`foveate.cite` returns one correct BibTeX entry for each paper, for keys, classes and objects."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass, replace
from importlib import import_module

import pytest
from torch import nn

import foveate
from foveate.core.catalog import system, systems
from foveate.core.catalog_rows import System
from foveate.core.cite import Bibliography, cite, entry, entry_keys, latex, split_name
from foveate.core.errors import OptionError, UnknownKey

HIP = """@misc{lee2024hip,
  title = {{HiP Attention: Sparse Sub-Quadratic Attention with Hierarchical Attention Pruning}},
  author = {Lee, Heejun and Park, Geon and Lee, Youngwan and Kim, Jina and Jeong, Wonyoung and Jeon, Myeongjae and \
Hwang, Sung Ju},
  year = {2024},
  eprint = {2406.09827},
  archivePrefix = {arXiv},
  url = {https://arxiv.org/abs/2406.09827},
}
"""


def keys(text: str) -> list[str]:
    return re.findall(r"^@misc\{(\w+),$", text, re.MULTILINE)


def cited(*used: object) -> list[str]:
    return [row.key for row in cite(*used).systems]


def test_a_printed_entry() -> None:
    text = foveate.cite("hip")
    assert text == HIP and repr(text) == HIP
    assert isinstance(text, Bibliography)


def test_keys_need_no_torch() -> None:
    code = "import sys, foveate; foveate.cite('hip', foveate.system('dsf')); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_several_keys_come_in_order_and_a_paper_once() -> None:
    text = cite("sink_recent", ["hip", ("sliding_window",)], "hip")
    assert keys(text) == ["xiao2023efficient", "lee2024hip"]
    assert [row.key for row in text.systems] == ["sink_recent", "hip", "sliding_window"]
    assert "}\n\n@misc" in text and text.endswith("}\n")


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("Heejun Lee", ("Lee", "", "Heejun")),
        ("Sung Ju Hwang", ("Hwang", "", "Sung Ju")),
        ("Jishnu Ray Chowdhury", ("Ray Chowdhury", "", "Jishnu")),
        ("Carmen Amo Alonso", ("Amo Alonso", "", "Carmen")),
        ("Melanie N. Zeilinger", ("Zeilinger", "", "Melanie N.")),
        ("Laurens van der Maaten", ("van der Maaten", "", "Laurens")),
        ("Van Tran", ("Tran", "", "Van")),
        ("de Lima", ("Lima", "", "de")),
        ("Robert Downey Jr.", ("Downey", "Jr.", "Robert")),
        ("García Márquez, Gabriel", ("García Márquez", "", "Gabriel")),
        ("King, Jr., Martin Luther", ("King", "Jr.", "Martin Luther")),
        ("Aristotle", ("Aristotle", "", "")),
        ("{Gemma Team}", ("Gemma Team", "", "")),
    ],
)
def test_names(name: str, parts: tuple[str, str, str]) -> None:
    assert split_name(name) == parts


def test_names_of_the_catalogue() -> None:
    assert "author = {Ray Chowdhury, Jishnu and Caragea, Cornelia}" in cite("monotonic_location_attention")
    assert "and Amo Alonso, Carmen and" in cite("dsf")
    assert r"Kaiser, {\L}ukasz" in cite("softmax")
    assert r"R{\'{e}}, Christopher" in cite("hedgehog")


def made_up(title: str = "A Title", authors: tuple[str, ...] = ("Ada Lovelace",), arxiv: str = "") -> System:
    return replace(system("hip"), title=title, authors=authors, arxiv=arxiv)


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("Hedgehog & Porcupine_1 at 5% {x} #2 $", r"Hedgehog \& Porcupine\_1 at 5\% \{x\} \#2 \$"),
        ("O(n²) and H₂O", "O(n$^{2}$) and H$_{2}$O"),
        ("Çağlar Gülçehre", r"{\c{C}}a{\u{g}}lar G{\"{u}}l{\c{c}}ehre"),
        ("Łukasz Søren Groß", r"{\L}ukasz S{\o}ren Gro{\ss}"),
        ("García", r"Garc{\'{\i}}a"),
        ("Nguyễn", r"Nguy{\~{\^{e}}}n"),
        ("a\\b~c^d", r"a\textbackslash{}b\textasciitilde{}c\textasciicircum{}d"),
        ("“α–β”", r"``$\alpha$--$\beta$''"),
        ("注意", "注意"),
    ],
)
def test_characters(text: str, written: str) -> None:
    assert latex(text) == written


def test_a_paper_without_a_number_has_no_address() -> None:
    text = entry(replace(system("hip"), arxiv="", title=system("hip").title))
    assert "eprint" not in text and "url" not in text and "archivePrefix" not in text


def test_a_group_name_is_not_split() -> None:
    assert entry_keys([made_up(authors=("{Gemma Team}",))]) == {"A Title": "gemmateam2024title"}
    text = entry(replace(system("hip"), authors=("{Gemma Team}", "Ada Lovelace")))
    assert "author = {{Gemma Team} and Lovelace, Ada}" in text


def test_entry_keys_are_unique() -> None:
    names = entry_keys(systems())
    assert len(set(names.values())) == len(names)
    assert all(re.fullmatch(r"[a-z]+\d{4}[a-z0-9]+", name) for name in names.values())
    assert names[system("memory_efficient_attention").arxiv] == "rabe2021self"
    alike = [made_up("The Sparse Way", arxiv="2401.00001"), made_up("Sparse Again", arxiv="2401.00002")]
    assert list(entry_keys(alike).values()) == ["lovelace2024sparseway", "lovelace2024sparseagain"]
    equal = [made_up("Sparse", arxiv="2401.00001"), made_up("Sparse", arxiv="2401.00002")]
    assert list(entry_keys(equal).values()) == ["lovelace2024sparse240100001", "lovelace2024sparse240100002"]


@pytest.mark.parametrize("key", [row.key for row in systems()])
def test_every_entry_is_well_formed(key: str) -> None:
    text = cite(key)
    assert text.isascii()
    assert text.count("{") == text.count("}")
    assert re.search(r"title = \{\{.+\}\},\n  author = \{.+\},\n  year = \{\d{4}\},", text)
    assert text.count(" and ") - cite(key).split("author")[0].count(" and ") == len(system(key).authors) - 1


@pytest.mark.parametrize("key", [row.key for row in systems()])
def test_objects_and_parts_name_their_system(key: str) -> None:
    assert cited(system(key).load()) == [key]
    for target in system(key).parts:
        module, _, name = target.partition(":")
        assert cited(getattr(import_module(module), name)) == [key]


def test_a_model_names_all_systems_inside_it() -> None:
    from foveate.nn import DualAttention, MultiHeadAttention

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = MultiHeadAttention(16, 2, op="hedgehog")
            self.others = nn.ModuleList([MultiHeadAttention(16, 2, op="softmax"), DualAttention(16, 2, 2)])
            self.again = MultiHeadAttention(16, 2, op="hedgehog")
            self.head = nn.Linear(16, 3)

    text = cite(Network())
    assert {"hedgehog", "softmax", "dual_attention_transformer"} <= {row.key for row in text.systems}
    assert keys(text)[0] == "zhang2024hedgehog"
    assert keys(text).count("zhang2024hedgehog") == 1
    assert "no published system" not in text


def test_methods_name_the_systems_inside_them() -> None:
    from foveate.host.operator_swap import PrefillSwap
    from foveate.kv import RazorAttention, Renumbered
    from foveate.ops import HiP

    assert cited(RazorAttention(), Renumbered()) == ["razor_attention", "sink_recent"]
    assert cited(PrefillSwap(HiP())) == ["hip"]
    assert cited(RazorAttention, foveate.kv.razor_heads) == ["razor_attention"]


def test_a_run_names_its_methods() -> None:
    from foveate.kv import SinkRecent
    from tests.support.host_models import model

    assert cited(foveate.apply(model("llama"), SinkRecent())) == ["sink_recent"]


def test_a_subclass_names_its_base_system() -> None:
    from foveate.ops import Hedgehog

    class Mine(nn.Module):
        def __init__(self, op: nn.Module) -> None:
            super().__init__()
            self.op = op

    @dataclass
    class Experiment:
        model: nn.Module
        others: dict[str, object]

    mine = Mine(Hedgehog(2, 4))
    assert cited(mine) == ["hedgehog"]
    held: list[object] = [mine]
    held.append(held)  # a circle
    assert cited(Experiment(mine, {"a": foveate.system, "b": held, "c": foveate.ops.HiP})) == ["hedgehog", "hip"]


def test_objects_without_a_system_are_listed() -> None:
    text = cite("hip", nn.Linear(2, 2), foveate.Packed())
    assert text.startswith("% no published system: Linear\n\n% no published system: Packed\n\n@misc{lee2024hip,")
    with pytest.raises(OptionError, match="keys, classes and objects of published systems; got Linear"):
        cite(nn.Linear(2, 2))
    with pytest.raises(OptionError, match="got nothing"):
        cite()
    with pytest.raises(UnknownKey, match='unknown system "hipp"; did you mean "hip"'):
        cite("hipp")
