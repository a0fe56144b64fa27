"""Draw the two call paths of docs/architecture.md: `python docs/architecture.py` writes docs/architecture-*.svg.

Plain SVG, so that GitHub, the site and a file on a disk show the same without a script or a network.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape
from pathlib import Path

HERE = Path(__file__).parent
LINE, PAD = 17, 12
INK, PALE, ACCENT = "#1f2937", "#6b7280", "#3949ab"


@dataclass
class Picture:
    """Boxes and arrows on a white ground, from top to bottom."""

    width: int
    height: int
    title: str
    parts: list[str] = field(default_factory=list)

    def box(self, x: int, y: int, width: int, title: str, *lines: str, file: str = "", filled: bool = False) -> int:
        """Draw a box with a title, the file that it stands for, and lines of text; return the y of its lower edge."""
        height = 2 * PAD + LINE * (1 + bool(file) + len(lines)) - 4
        fill = "#e8eaf6" if filled else "#ffffff"
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" fill="{fill}" stroke="{ACCENT}"/>'
        )
        at = y + PAD + 11
        self.text(x + PAD, at, title, bold=True)
        if file:
            at += LINE
            self.text(x + PAD, at, file, color=ACCENT, mono=True)
        for line in lines:
            at += LINE
            self.text(x + PAD, at, line)
        return y + height

    def text(
        self, x: int, y: int, words: str, *, bold: bool = False, mono: bool = False, color: str = INK, end: bool = False
    ) -> None:
        """Write one line."""
        family = "ui-monospace, Menlo, Consolas, monospace" if mono else "system-ui, Helvetica, Arial, sans-serif"
        style = f'font-family="{family}" font-size="{12 if mono else 13}" fill="{color}"'
        style += ' font-weight="600"' if bold else ""
        style += ' text-anchor="end"' if end else ""
        self.parts.append(f'<text x="{x}" y="{y}" {style}>{escape(words)}</text>')

    def arrow(self, *points: tuple[int, int], label: str = "", dashed: bool = False) -> None:
        """Draw a line through the points, with a head at its end and a label beside its first part."""
        path = " ".join(f"{x},{y}" for x, y in points)
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self.parts.append(
            f'<polyline points="{path}" fill="none" stroke="{INK}" stroke-width="1.3" marker-end="url(#head)"{dash}/>'
        )
        if label:
            (x, y), (_, below) = points[0], points[1]
            self.text(x + 8, (y + below) // 2 + 5, label, color=PALE)

    def save(self, path: Path) -> None:
        """Write the picture."""
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" width="{self.width}" '
            f'height="{self.height}" role="img" aria-label="{escape(self.title)}">'
        )
        marker = (
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
            f'orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="{INK}"/></marker></defs>'
        )
        ground = f'<rect width="{self.width}" height="{self.height}" fill="#ffffff"/>'
        path.write_text("\n".join([head, marker, ground, *self.parts, "</svg>"]) + "\n", "utf-8")


#: The operators' families: title, file, and what a subclass writes.
FAMILIES = (
    ("Scored", "scored.py", "prepare, score,", "normalize, values"),
    ("Selective", "selective.py", "select: which keys", "each query sees"),
    ("Linear", "linear.py", "query_features,", "key_features, log_decay"),
    ("Memory", "test_time.py", "initial, read,", "surprise"),
)


def attend() -> Picture:
    """Draw a tensor's way through `foveate.attend`."""
    p = Picture(900, 720, "A tensor through foveate.attend")
    y = _checked_call(p)
    p.arrow((450, y), (450, y + 34), label="the family's base class takes over")
    out = _computed(p, _families(p, y + 34))
    p.box(
        16, out, 868, "out (B, Hq, Nq, Dv)",
        "zeros for a query that sees no key; NaN behind a mask does not leak", filled=True,
    )  # fmt: skip
    p.height = out + 74
    return p


def _checked_call(p: Picture) -> int:
    """Draw how a call is checked; return the y below it."""
    y = p.box(
        210, 16, 480, 'foveate.attend(q, k, v, "hip", causal=True, keep=512)',
        "the catalogue turns the key into a class,", "and the options make an Operator of it",
        file="ops/calls.py", filled=True,
    )  # fmt: skip
    p.arrow((450, y), (450, y + 30), label="q (B, Hq, Nq, D)   k, v (B, Hkv, Nk, ·)")
    y = p.box(
        210, y + 30, 480, "Operator.forward",
        "checks shapes, dtypes, head counts, the mask and further inputs;",
        "refuses by name a pattern or mask that the mechanism does not define",
        file="ops/operator.py",
    )  # fmt: skip
    p.arrow((450, y), (450, y + 30))
    return p.box(
        210, y + 30, 480, "AttentionCall",
        "q, k, v, scale, mask, causal, engine, inputs, checked:", "all that decides who attends to whom",
        file="core/call.py",
    )  # fmt: skip


def _families(p: Picture, top: int) -> int:
    """Draw the families, with arrows to what computes them; return the y at which the arrows end."""
    lower = 0
    for number, (title, file, *lines) in enumerate(FAMILIES):
        lower = p.box(16 + 219 * number, top, 211, title, *lines, file=f"ops/base/{file}", filled=True)
    p.text(16, lower + 18, "dense and sparse: pairs of tokens", color=PALE)
    p.text(884, lower + 18, "a state in place of pairs", color=PALE, end=True)
    for x in (121, 340, 559, 778):
        p.arrow((x, lower + 26), (x, lower + 48))
    return lower + 48


def _computed(p: Picture, top: int) -> int:
    """Draw the engines and the scans, with arrows to the output; return the y at which the arrows end."""
    left = p.box(
        16, top, 430, 'engine="auto" picks, and plan() says which and why',
        "fused: PyTorch's kernel for a softmax over dot products",
        "slices, gather, flex: the chosen keys of a selection",
        "chunked: any scoring, in O(N) memory",
        "reference: the whole matrix; it decides what is right",
        file="core/engines",
    )  # fmt: skip
    right = p.box(
        462, top, 422, "scans of their own",
        "chunked (the default), recurrent, reference;", "sums in float32 for half precision",
        file="ops/functional",
    )  # fmt: skip
    p.arrow((231, left), (231, left + 34))
    p.arrow((868, right), (868, left + 34))
    p.text(462, right + 24, "step and prefill: one token, or a prompt and then tokens.", color=PALE)
    p.text(462, right + 42, "Scored and Selective keep keys and values, Linear and", color=PALE)
    p.text(462, right + 60, "Memory a state of one size (ops/base/streaming.py).", color=PALE)
    return left + 34


def apply() -> Picture:
    """Draw a token's way through `apply` and `generate`."""
    p = Picture(900, 860, "A token through foveate.apply and model.generate")
    loop, y = _entered(p)
    end = _after_the_call(p, _acted(p, y))
    p.arrow((40, end), (40, end + 24), (6, end + 24), (6, loop + 30), (208, loop + 30), dashed=True)
    p.text(52, end + 30, "the next layer, and the next token", color=PALE)
    p.arrow((450, end), (450, end + 46))
    last = p.box(
        210, end + 46, 480, "the block ends, also after an exception",
        "weights, configuration, hooks: what they were, bit for bit",
    )  # fmt: skip
    p.height = last + 16
    return p


def _entered(p: Picture) -> tuple[int, int]:
    """Draw the way to an attention call; return the y at which the loop over layers begins, and the y below."""
    y = p.box(
        210, 16, 480, "with foveate.apply(model, method) as run:",
        "method.bind(host) reads the model's sizes, or refuses it;",
        "the model gets hooks, and Foveate's attention function",
        file="host/entry.py, host/run.py, host/hf/attach.py", filled=True,
    )  # fmt: skip
    p.arrow((450, y), (450, y + 30), label="model.generate(ids): the prompt, and then token after token")
    loop = y + 30
    y = p.box(
        210, loop, 480, "the model's own layer: q, k, v and rotary positions",
        "the cache takes k and v: the model's own layer of it, or",
        "slots where a method drops tokens or stores in place",
        file="host/hf/cache.py, host/slots",
    )  # fmt: skip
    p.arrow((450, y), (450, y + 30), label="transformers' attention interface")
    y = p.box(
        210, y + 30, 480, "attention_function",
        "does any method act at this call (Method.at)?", file="host/hf/dispatch.py",
    )  # fmt: skip
    return loop, y


def _acted(p: Picture, y: int) -> int:
    """Draw a call that no method acts at beside one that methods act at; return the y at which both join."""
    top = y + 40
    p.arrow((330, y), (330, top), label="no")
    p.arrow((570, y), (570, top), label="yes")
    native = p.box(
        16, top, 400, "the model's own kernel",
        "bit for bit what the model computes;", "evicted layers: the fused kernel on their slots",
        file="core/engines/fused.py",
    )  # fmt: skip
    site = p.box(
        440, top, 444, "Site", "q, k, v, positions, phase, mask; what methods remember",
        file="host/site.py, host/pieces.py",
    )  # fmt: skip
    p.arrow((662, site), (662, site + 26))
    hooks = p.box(
        440, site + 26, 444, "the hooks that methods override, in this order",
        "select: the keys that a query sees",
        "attend: an output in place of attention's",
        "edit_logits, edit_weights: the matrix, before and after the softmax",
        "edit_output, read: each head's output, to change or to look at",
        file="host/method.py, host/attention.py", filled=True,
    )  # fmt: skip
    join = max(native, hooks) + 34
    p.arrow((216, native), (216, join))
    p.arrow((662, hooks), (662, join))
    return join


def _after_the_call(p: Picture, join: int) -> int:
    """Draw what comes after a call, and after a block; return the y below."""
    end = p.box(
        16, join, 868, "after the call",
        "keep: the slots that survive; fold: a summary of the others; refit: new values; the cache shrinks",
        "run.stats counts what was kept, read and spent",
        file="host/evict.py, host/slots/store.py, host/stats.py", filled=True,
    )  # fmt: skip
    return p.box(
        16, end + 24, 868, "between blocks, and at the end of the model",
        "edit_hidden: what a block gives to the next; edit_next_token: the last logits, perhaps against a Branch",
        file="host/hf/hidden.py, host/hf/next_token.py, host/branch.py", filled=True,
    )  # fmt: skip


if __name__ == "__main__":
    for picture, name in ((attend(), "attend"), (apply(), "apply")):
        picture.save(HERE / f"architecture-{name}.svg")
