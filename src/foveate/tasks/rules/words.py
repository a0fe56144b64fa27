"""Words, overlaps and distances that several benchmarks' rules share."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_ASCII = str.maketrans("", "", string.punctuation)
#: The Chinese and full-width punctuation that LongBench and SCBench remove.
_WIDE = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』"
    "【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
)
_ALL = str.maketrans("", "", string.punctuation + _WIDE)


def squad_words(text: str) -> list[str]:
    """Return SQuAD's words of a text: lower case, without punctuation and without a, an, the."""
    return _ARTICLES.sub(" ", text.lower().translate(_ASCII)).split()


def unspaced(text: str) -> str:
    """Return a text in lower case without blanks, and without ASCII and Chinese punctuation."""
    return "".join(text.lower().translate(_ALL).split())


def f1(found: Sequence[str], wanted: Sequence[str]) -> float:
    """Return the harmonic mean of precision and recall of two bags of words; 0.0 if they share none."""
    shared = sum((Counter(found) & Counter(wanted)).values())
    if not shared:
        return 0.0
    precision, recall = shared / len(found), shared / len(wanted)
    return 2 * precision * recall / (precision + recall)


def edit_distance(left: Sequence[str], right: Sequence[str]) -> int:
    """Return the fewest insertions, deletions and replacements that turn one sequence into the other."""
    row = list(range(len(right) + 1))
    for i, a in enumerate(left, 1):
        corner, row[0] = row[0], i
        for j, b in enumerate(right, 1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (a != b))
    return row[-1]


def lcs_words(left: Sequence[str], right: Sequence[str]) -> set[str]:
    """Return the different words of a longest common subsequence.

    Where several subsequences are equally long, the word that `right` lost last decides, as in the package rouge.
    """
    table = [[0] * (len(right) + 1) for _ in range(len(left) + 1)]
    for i, a in enumerate(left, 1):
        for j, b in enumerate(right, 1):
            table[i][j] = table[i - 1][j - 1] + 1 if a == b else max(table[i - 1][j], table[i][j - 1])
    found, i, j = set(), len(left), len(right)
    while i and j:
        if left[i - 1] == right[j - 1]:
            i, j = i - 1, j - 1
            found.add(left[i])
        elif table[i - 1][j] > table[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found
