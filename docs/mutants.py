"""`make mutants`: do the tests notice when a file changes?

Cosmic Ray changes an operator, a number or a condition in a file; the file's own tests (without slow ones) should then
fail. A system's file has its system's test. Another file has the tests that `TESTS` names, or the test of its name, or
tests that import it. A few changes are drawn for each file, the same ones for the same file. Writes docs/mutants.md and
docs/measured/mutants.json after each file; names of files, systems or rooms as arguments do only these again.
"""

from __future__ import annotations

import ast
import compileall
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from py_compile import PycInvalidationMode
from queue import Queue
from threading import Lock
from typing import Any

from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import TestOutcome, WorkerOutcome, WorkItem, WorkResult

from foveate.core.catalog import systems

ROOT = Path(__file__).resolve().parent.parent
PAGE, RECORD = ROOT / "docs" / "mutants.md", ROOT / "docs" / "measured" / "mutants.json"
ROOMS = ("core", "ops", "nn", "models", "host", "kv", "steer", "lens", "train", "tasks", "studies", "bench", "report")
PER_FILE, WORKERS, SECONDS, SEED = 5, int(os.environ.get("WORKERS", "2")), 240, 0
#: Rooms of many files have fewer changes for each.
FEWER = {"core": 3, "models": 3, "host": 3, "train": 3, "tasks": 3, "bench": 3, "report": 3}
#: What changes nothing that runs: decorators such as `final`, and `is` between strings that Python keeps once.
IGNORED = (
    "core/RemoveDecorator",
    "core/ReplaceComparisonOperator_Eq_Is",
    "core/ReplaceComparisonOperator_NotEq_IsNot",
)  # fmt: skip
#: Tests of what no test is named after, or whose own test is slow: a contract on a few systems, or a neighbour's tests.
TESTS = {
    "core/call.py": "tests/core/test_call.py tests/core/test_engines.py",
    "core/catalog.py": "tests/core/test_catalog.py tests/core/test_cite.py",
    "core/engines/__init__.py": "tests/core/test_engines.py",
    "core/engines/chunked.py": "tests/core/test_engines.py",
    "core/engines/flex.py": "tests/core/test_call.py tests/core/test_engines.py",
    "core/engines/fused.py": "tests/core/test_engines.py tests/host/test_packed.py",
    "core/engines/gather.py": "tests/core/test_engines.py tests/core/test_rows.py "
    "tests/systems/kv/test_token_select.py",
    "core/engines/reference.py": "tests/core/test_engines.py",
    "core/online_softmax.py": "tests/core/test_online.py",
    "core/readable.py": "tests/core/test_readable.py tests/core/test_known.py tests/core/test_engines.py",
    "core/scoring.py": "tests/core/test_engines.py",
    "core/window_selection.py": "tests/core/test_selection.py tests/core/test_engines.py",
    "models/base/byte_tokenizer.py": "tests/models/test_tokenizers.py",
    "models/base/number_tokenizer.py": "tests/models/test_tokenizers.py",
    "models/base/spec.py": "tests/train/test_loop.py -k 'any_operator or images or invalid_networks'",
    "host/attention.py": "tests/contracts/test_host_methods.py tests/contracts/test_hosts.py "
    "-k 'test_host_methods or weights_on_request or (callers_own and gemma2) or (test_by_hand and gemma2)'",
    "host/entry.py": "tests/host/test_stats.py tests/contracts/test_host_methods.py tests/host/test_composition.py",
    "host/evict.py": "tests/host/test_ends.py tests/contracts/test_host_eviction.py",
    "host/fused_statistics.py": "tests/host/test_fused_statistics.py tests/lens/test_look.py",
    "host/hf/adoption.py": "tests/contracts/test_host_sites.py tests/contracts/test_host_generation.py "
    "-k 'sites or static or drafts_keep or phases or encoder_decoders'",
    "host/hf/attach.py": "tests/host/test_nesting.py tests/contracts/test_host_trace.py "
    "tests/contracts/test_host_generation.py -k 'nest or exception or after_the_block or copy or saved or another'",
    "host/hf/cache.py": "tests/contracts/test_host_trace.py tests/contracts/test_host_once.py "
    "tests/host/test_kinds_of_models.py "
    "tests/host/test_dropping.py::test_a_reordered_cache_takes_the_numbers_of_its_sequences_along",
    "host/hf/calls.py": "tests/host/test_kinds_of_models.py tests/host/test_nesting.py",
    "host/hf/chat_template.py": "tests/host/test_context.py",
    "host/hf/compressed.py": "tests/contracts/test_host_once.py tests/host/test_caches_elsewhere.py",
    "host/hf/dispatch.py": "tests/host/test_renumbered.py tests/contracts/test_host_methods.py "
    "tests/contracts/test_host_trace.py",
    "host/hf/hooks.py": "tests/contracts/test_host_generation.py -k 'copy or saved or checkpointed or another'",
    "host/hf/layout.py": "tests/host/test_layout.py tests/systems/kv/test_razor_attention.py "
    "tests/contracts/test_policies.py -k 'layout or razor and not live_memory'",
    "host/hf/marks.py": "tests/host/test_context.py",
    "host/hf/mask.py": "tests/host/test_mask.py tests/contracts/test_host_eviction.py",
    "host/hf/model.py": "tests/lens/test_look.py tests/host/test_composition.py",
    "host/hf/passes.py": "tests/contracts/test_host_generation.py tests/contracts/test_hosts.py "
    "-k 'phases or batching or checkpointed or searches or gradients'",
    "host/hf/sites.py": "tests/host/test_kinds_of_models.py tests/host/test_nesting.py",
    "host/method.py": "tests/host/test_method.py tests/contracts/test_host_methods.py "
    "tests/host/test_kinds_of_models.py",
    "host/padding.py": "tests/host/test_padding.py tests/systems/kv/test_token_select.py tests/host/test_renumbered.py",
    "host/pieces.py": "tests/host/test_renumbered.py tests/contracts/test_host_once.py "
    "tests/contracts/test_host_generation.py -k 'not searches and not checkpointed and not encoder_decoders'",
    "host/run.py": "tests/host/test_nesting.py tests/host/test_stats.py tests/contracts/test_host_methods.py "
    "tests/contracts/test_host_sites.py tests/host/test_kinds_of_models.py",
    "host/site.py": "tests/host/test_site.py tests/contracts/test_host_sites.py "
    "tests/contracts/test_host_eviction.py tests/systems/kv/test_token_select.py",
    "host/slots/group.py": "tests/host/test_ends.py tests/host/test_caches_elsewhere.py "
    "tests/contracts/test_host_eviction.py",
    "host/slots/slots.py": "tests/host/test_ends.py tests/contracts/test_host_eviction.py",
    "host/slots/store.py": "tests/host/test_ends.py tests/contracts/test_host_once.py "
    "tests/host/test_caches_elsewhere.py",
    "kv/base/policy.py": "tests/systems/kv/test_sink_recent.py tests/contracts/test_policies.py "
    "-k 'sink_recent and not live_memory'",
    "kv/parts/calibration_store.py": "tests/bench/test_compare.py -k 'not operator'",
    "kv/parts/head_split.py": "tests/kv/test_head_split.py tests/systems/kv/test_razor_attention.py "
    "tests/systems/kv/test_duo_attention.py",
    "kv/parts/last_query.py": "tests/kv/test_last_query.py tests/systems/kv/test_recycled_attention.py "
    "tests/systems/kv/test_token_select.py",
    "random_keep": "tests/kv/test_random_keep.py tests/systems/kv/test_score_policies.py",
    "kv/renumbered.py": "tests/host/test_renumbered.py",
    "lens/capture/record.py": "tests/lens/test_look.py",
    "lens/capture/tiles.py": "tests/lens/test_tiles.py tests/lens/test_look.py",
    "lens/measures.py": "tests/lens/test_measures.py tests/lens/test_look.py",
    "train/loop/checkpoint.py": "tests/train/test_job.py -k 'folder or damaged or several or finished or fit'",
    "train/loop/job.py": "tests/train/test_job.py -k 'not every'",
    "train/loop/seeds.py": "tests/train/test_job.py -k seeds",
    "train/loop/loop.py": "tests/train/test_loop.py "
    "-k 'rate or schedule or seed or decay or progress or positions or finite'",
    "train/loop/network.py": "tests/train/test_loop.py -k 'any_operator or fixed or images or invalid_networks'",
    "tasks/base/scores.py": "tests/tasks/test_scores.py tests/tasks/test_ruler.py",
    "tasks/base/training_task.py": "tests/tasks/test_training_tasks.py tests/systems/tasks/test_zoology_mqar.py",
    "tasks/files/formats.py": "tests/tasks/test_rows.py",
    "tasks/files/prompts.py": "tests/tasks/test_prompts.py tests/tasks/test_rows.py",
    "tasks/files/records.py": "tests/tasks/test_rows.py tests/tasks/test_prompts.py",
    "tasks/parts/haystack.py": "tests/tasks/test_ruler.py tests/tasks/test_needle.py",
    "bench/calibration.py": "tests/bench/test_compare.py -k 'not operator'",
    "bench/capabilities.py": "tests/contracts/test_capabilities.py",
    "bench/comparison/columns.py": "tests/report/test_table.py",
    "bench/comparison/evaluation.py": "tests/bench/test_compare.py tests/bench/test_measure.py -k 'not operator'",
    "bench/comparison/interleaved.py": "tests/bench/test_resume.py tests/bench/test_compare.py -k 'not operator'",
    "bench/comparison/run.py": "tests/bench/test_compare.py tests/bench/test_measure.py -k 'not operator'",
    "bench/comparison/table.py": "tests/report/test_table.py",
    "bench/comparison/task_choice.py": "tests/bench/test_compare.py -k 'not operator'",
    "bench/loading/adapters.py": "tests/bench/test_loading.py",
    "bench/loading/device.py": "tests/bench/test_loading_parts.py",
    "bench/loading/files.py": "tests/bench/test_loading_parts.py tests/bench/test_loading.py",
    "bench/loading/gguf.py": "tests/bench/test_loading_parts.py tests/bench/test_loading.py",
    "bench/loading/load.py": "tests/bench/test_loading_parts.py tests/bench/test_loading.py",
    "bench/loading/refusal.py": "tests/bench/test_loading_parts.py tests/bench/test_loading.py",
    "bench/loading/rope_scaling.py": "tests/bench/test_loading.py",
    "bench/loading/source.py": "tests/bench/test_loading.py",
    "bench/loading/trial.py": "tests/bench/test_loading.py",
    "bench/loading/weights.py": "tests/bench/test_loading_parts.py tests/bench/test_loading.py",
    "bench/methods.py": "tests/bench/test_compare.py",
    "bench/parts/timing.py": "tests/bench/test_timing.py tests/bench/test_intervals.py -k 'not coverage'",
    "bench/parts/memory.py": "tests/bench/test_measure.py",
    "bench/parts/plaindata.py": "tests/bench/test_results.py",
    "bench/policies/answers.py": "tests/bench/test_policies.py -k 'interrupted or skip or past_the or counts'",
    "bench/policies/calibrate.py": "tests/bench/test_policies.py -k figure",
    "bench/policies/losses.py": "tests/bench/test_policies.py -k 'figure or counts_its'",
    "bench/policies/model_run.py": "tests/bench/test_policies.py -k 'interrupted or skip or figure'",
    "bench/policies/plan.py": "tests/bench/test_policies.py -k 'plan or catalogue or past_the_context'",
    "bench/policies/run.py": "tests/bench/test_policies.py -k 'interrupted or twice or weights or past_the_context'",
    "bench/policies/shared_prefill.py": "tests/bench/test_policies.py -k 'prefill or losses or counted or counts'",
    "bench/policies/summary.py": "tests/bench/test_policies.py -k 'figure or skip'",
    "report/policies.py": "tests/bench/test_policies.py -k page",
    "ops/functional/alibi.py": "tests/ops/test_prepare.py",
    "ops/base/kv_state.py": "tests/ops/test_prepare.py",
    "ops/base/kv_cached.py": "tests/contracts/test_operators.py tests/ops/test_streaming.py "
    "tests/systems/ops/test_hip.py -k 's2_attention or told or plan'",
    "ops/base/scored.py": "tests/contracts/test_operators.py -k 'sigmoid_attention or neural_attention'",
    "ops/functional/linear_forms.py": "tests/ops/test_linear.py",
    "ops/operator.py": "tests/contracts/test_operators_refuse.py -k 'sliding_window or titans'",
    "ops/base/selective.py": "tests/contracts/test_operators.py -k s2_attention",
    "ops/base/state_size.py": "tests/ops/test_prepare.py",
}
#: Instances made for the tests are part of these, not of the mechanism.
FOR_TESTS = ("example", "example_input", "example_inputs", "exact")

_WRITING = Lock()
#: Tests that passed on unchanged files.
_PASSED: set[tuple[str, ...]] = set()

Span = tuple[tuple[int, int], tuple[int, int]]

HEAD = """# Mutants

Generated by `make mutants`: up to {per} changes (an operator, a number, a condition) are made to a file, one at a time,
and its own tests, without the slow ones, are run. It is up to {fewer} changes in {few}.
A change that they do not notice survives. What changes nothing that runs is left out (annotations, decorators), and so
are the instances that a class makes for its tests.

**{killed} of {all} killed: {share:.0%}**; the lowest share of a file is {lowest:.0%}.

| room | killed | of | share | lowest share of a file |
|---|---|---|---|---|
"""
TABLE = """
## {room}

| system or file | killed | of | survivors (line: change) |
|---|---|---|---|
"""


@dataclass(frozen=True)
class Target:
    """A file to change and the tests that should notice; `name` is the system's key, or the file's path."""

    name: str
    module: Path
    tests: tuple[str, ...]

    @property
    def room(self) -> str:
        return self.module.parts[2]


def main(names: list[str]) -> int:
    everything = list(targets())
    chosen = [target for target in everything if not names or {target.name, target.room} & set(names)]
    found: dict[str, Any] = json.loads(RECORD.read_text("utf-8")) if names and RECORD.is_file() else {}
    with tempfile.TemporaryDirectory() as folder:
        places: Queue[Path] = Queue()
        for number in range(WORKERS):
            places.put(_workspace(Path(folder) / str(number)))

        def one(target: Target) -> None:
            place = places.get()
            try:
                found[target.name] = _mutate(target, place)
            finally:
                places.put(place)
            print(f"{target.name}: {_killed(found[target.name])} of {len(found[target.name])} killed", flush=True)
            _write(found, everything)

        with ThreadPoolExecutor(WORKERS) as pool:
            list(pool.map(one, chosen))
    found = _write(found, everything)
    low = [name for name, mutants in found.items() if _share([mutants]) < 0.6]
    print(f"{_share(found.values()):.1%} killed; under 60 %: {', '.join(low) or 'none'}")
    return int(_share(found.values()) < 0.85 or bool(low))


def _write(found: dict[str, Any], everything: list[Target]) -> dict[str, Any]:
    """Write the record and the page; return the record in the order of the rooms, without files that have no mutant."""
    with _WRITING:
        ordered = {target.name: found[target.name] for target in everything if found.get(target.name)}
        RECORD.write_text(json.dumps(ordered, indent=1) + "\n", "utf-8")
        PAGE.write_text(_page(ordered, {target.name: target.room for target in everything}), "utf-8")
    return ordered


def targets() -> Iterator[Target]:
    """Every file of the rooms that has tests; in a room, those of systems first, in the order of the catalogue."""
    rows = {_file_of(row.object): row for room in ROOMS for row in systems(room)}
    for room in ROOMS:
        files = [path.relative_to(ROOT) for path in sorted((ROOT / "src/foveate" / room).rglob("[a-z]*.py"))]
        own = {module: row for module, row in rows.items() if module in files}
        for module, row in own.items():
            yield Target(row.key, module, (TESTS.get(row.key, row.test),))
        for module in files:
            name = str(module.relative_to("src/foveate"))
            tests = [TESTS[name]] if name in TESTS else _tests_of(module, room)
            tests = tests or [row.test for user, row in rows.items() if _imports(user, module)]
            if module not in own and tests:
                yield Target(name, module, tuple(tests[:2]))


def _file_of(named: str) -> Path:
    """Return the file of "module:Name"."""
    return Path("src", *named.partition(":")[0].split(".")).with_suffix(".py")


def _tests_of(module: Path, room: str) -> list[str]:
    named = sorted(ROOT.glob(f"tests/{room}/test_{module.stem}.py"))
    named = named or sorted(ROOT.glob(f"tests/systems/*/test_{module.stem}.py"))
    others = sorted(ROOT.glob("tests/systems/*/test_*.py")) + sorted(ROOT.glob(f"tests/{room}/test_*.py"))
    return [str(test.relative_to(ROOT)) for test in named or others if named or _imports(test, module)]


def _imports(user: Path, module: Path) -> bool:
    """Return whether one file names the other one in an import."""
    package, name = ".".join(module.parts[1:-1]), module.stem
    return f"{package}.{name}" in _imported(user)


@cache
def _imported(user: Path) -> frozenset[str]:
    """Return the modules that a file imports from, and what it imports from them, with dots."""
    tree = ast.parse((ROOT / user).read_text("utf-8"))
    froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return frozenset(
        {f"{node.module}" for node in froms} | {f"{node.module}.{a.name}" for node in froms for a in node.names}
    )


def _workspace(place: Path) -> Path:
    """A copy of the code to change and of the tests to run, compiled once.

    Compiled files are checked by their source's hash: a change keeps a file's size and may keep its second.
    """
    for name in ("src", "tests"):
        shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", place)
    compileall.compile_dir(place / "src", quiet=1, invalidation_mode=PycInvalidationMode.CHECKED_HASH)
    return place


def _mutate(target: Target, place: Path) -> list[dict[str, Any]]:
    """The drawn mutants of one file, and whether its tests killed them."""
    module, name = target.module, target.name.replace("/", "-")
    config, session = place / "mutants.toml", place / f"{name}.sqlite"
    options = "-x -q -p no:cacheprovider -p no:randomly -m 'not slow'"
    tests = f"{sys.executable} -m pytest {options} {' '.join(target.tests)}"
    config.write_text(
        f'[cosmic-ray]\nmodule-path = "{module}"\ntimeout = {SECONDS}.0\nexcluded-modules = []\n'
        f'test-command = "{tests}"\n[cosmic-ray.distributor]\nname = "local"\n'
    )
    here = {**os.environ, "PYTHONPATH": str(place / "src"), "OMP_NUM_THREADS": "1"}
    if target.tests not in _PASSED:  # unchanged, the tests pass: else everything would count as killed
        _run(tests, place, here)
        _PASSED.add(target.tests)
    _run(f"cosmic-ray init {config.name} {session.name}", place, here)
    with use_db(str(session), WorkDB.Mode.open) as db:
        _draw(db, target, (place / module).read_text("utf-8"))
    _run(f"cosmic-ray exec {config.name} {session.name}", place, here)
    with use_db(str(session), WorkDB.Mode.open) as db:
        return sorted(_results(db), key=lambda mutant: mutant["line"])


def _run(command: str, place: Path, environment: dict[str, str]) -> None:
    done = subprocess.run(command, cwd=place, env=environment, shell=True, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{command} failed:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")


def _draw(db: WorkDB, target: Target, source: str) -> None:
    """Leave a few of the pending changes, from all over the file, and skip the others."""
    inert = _inert(source)
    pending = list(db.pending_work_items)
    # sorted, since the database has an order of its own every time
    real = sorted((item for item in pending if _is_real(item, inert)), key=_place)
    count = min(FEWER.get(target.room, PER_FILE), len(real))
    kept = {item.job_id for item in random.Random(f"{target.name} {SEED}").sample(real, count)}
    skipped = [item.job_id for item in pending if item.job_id not in kept]
    db.set_multiple_results(skipped, WorkResult(WorkerOutcome.SKIPPED))


def _place(item: WorkItem) -> tuple[tuple[int, int], str, int, str]:
    mutation = item.mutations[0]
    return mutation.start_pos, mutation.operator_name, mutation.occurrence, str(mutation.operator_args)


def _is_real(item: WorkItem, inert: list[Span]) -> bool:
    mutation = item.mutations[0]
    counts = not any(start <= mutation.start_pos < end for start, end in inert)
    return counts and not mutation.operator_name.startswith(IGNORED)


def _inert(source: str) -> list[Span]:
    """Return the places of annotations, which no test could notice as they are strings, and of code for tests."""
    nodes = list(ast.walk(ast.parse(source)))
    parts = [getattr(node, name, None) for node in nodes for name in ("annotation", "returns")]
    parts += [node for node in nodes if isinstance(node, ast.FunctionDef) and node.name in FOR_TESTS]
    return [((p.lineno, p.col_offset), (p.end_lineno, p.end_col_offset)) for p in parts if p is not None]


def _results(db: WorkDB) -> Iterator[dict[str, Any]]:
    items = {item.job_id: item for item in db.work_items}
    for job, result in db.results:
        if result.worker_outcome != WorkerOutcome.SKIPPED:
            mutation = items[job].mutations[0]
            name = mutation.operator_name.removeprefix("core/")
            yield {
                "line": mutation.start_pos[0],
                "change": name,
                "killed": result.test_outcome != TestOutcome.SURVIVED,
                "diff": [
                    line
                    for line in (result.diff or "").splitlines()
                    if line[:1] in "+-" and line[:3] not in ("+++", "---")
                ],
            }


def _killed(mutants: list[dict[str, Any]]) -> int:
    return sum(mutant["killed"] for mutant in mutants)


def _share(found: Iterable[list[dict[str, Any]]]) -> float:
    everything = [mutant for mutants in found for mutant in mutants]
    return _killed(everything) / max(1, len(everything))


def _page(found: dict[str, Any], rooms: dict[str, str]) -> str:
    by_room = {room: {n: ms for n, ms in found.items() if rooms[n] == room} for room in ROOMS}
    by_room = {room: files for room, files in by_room.items() if files}
    everything = [mutant for mutants in found.values() for mutant in mutants]
    text = HEAD.format(
        per=PER_FILE, fewer=max(FEWER.values()), few=", ".join(FEWER), killed=_killed(everything), all=len(everything),
        share=_share(found.values()), lowest=_lowest(found),
    )  # fmt: skip
    for room, files in by_room.items():
        mutants = [mutant for mutants in files.values() for mutant in mutants]
        text += f"| {room} | {_killed(mutants)} | {len(mutants)} | {_share([mutants]):.0%} | {_lowest(files):.0%} |\n"
    for room, files in by_room.items():
        text += TABLE.format(room=room)
        for name, mutants in files.items():
            survivors = "; ".join(f"{m['line']}: {m['change']}" for m in mutants if not m["killed"])
            text += f"| {name} | {_killed(mutants)} | {len(mutants)} | {survivors} |\n"
    return text


def _lowest(found: dict[str, Any]) -> float:
    return min((_share([mutants]) for mutants in found.values()), default=0.0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
