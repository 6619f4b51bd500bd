# SPDX-License-Identifier: Apache-2.0
"""Runs the conformance suite on MoE code that others wrote, and explains every verdict that is not green.

python benchmarks/implementations.py [--impl GLOB]... [--scale tiny|small] [--out FOLDER]

It needs the libraries (`pip install transformers torchtitan megatron-core`, none of which may replace torch) and, for
Ling's own code, HAL_LING_FILE and HAL_LING_V2_FILE. What is not installed is left out and named. It exits with 1 if a
verdict that is not green has no reason here.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from fnmatch import fnmatchcase
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from harness import machine

HAL = str(Path(sys.executable).parent / "hal")
FAMILIES = ("router", "dispatch", "experts", "combine", "losses", "layer", "determinism")
GREEN = ("EXACT", "PASS", "PASS-AMBIGUOUS")
NEUTRAL = ("UNSUPPORTED", "SKIPPED")
LIBRARIES = ("torch", "transformers", "torchtitan", "megatron-core")

_GROUPED = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3")
_OTHERS = ("minimax", "qwen3_next", "flex_olmo", "glm4_moe", "dots1", "solar_open", "bailing_hybrid")
ALL = (
    *(f"transformers:{name}{ending}" for name in _GROUPED for ending in ("", ".grouped_mm")),
    "transformers:mixtral.batched_mm", "transformers:deepseek_v3.batched_mm",
    *(f"transformers:{name}.losses" for name in _GROUPED[:4]),
    *(f"transformers:{name}" for name in _OTHERS),
    "torchtitan:moe", "torchtitan:moe.float32_gate", "megatron:core", "ling:lite", "ling:lite.inference", "ling:mini",
)  # fmt: skip

REASONS: tuple[tuple[str, str, str, str], ...] = (
    # implementation, case, part of the detail, finding
    ("*", "router.tie_order", "where the result is exact", "ties"),
    ("*", "router.ties_untrained", "where the result is exact", "ties"),
    ("*", "router.degenerate", "experts of the zero token", "ties"),
    ("*", "layer.tie_order", "where the result is exact", "ties"),
    ("*", "layer.degenerate", "experts of the zero token", "ties"),
    ("transformers:*", "experts.no_rows", "requires no gradient", "hf-no-graph"),
    ("transformers:*.batched_mm", "experts.backward", "dw", "hf-batched-gradient"),
    ("transformers:*.batched_mm", "experts.backward_sweep", "dw", "hf-batched-gradient"),
    ("transformers:*.batched_mm", "experts.backward_cancelling", "dw", "hf-batched-gradient"),
    ("transformers:*.grouped_mm", "*.unaligned", "multiple of 16 bytes", "torch-alignment"),
    ("transformers:*.batched_mm", "experts.strided", "dw", "hf-batched-gradient"),
    ("transformers:*.batched_mm", "experts.backward_integers", "dw", "hf-batched-gradient"),
    ("transformers:*.batched_mm", "experts.one_expert", "dw", "hf-batched-gradient"),
    ("transformers:*.batched_mm", "experts.wide", "dw", "hf-batched-gradient"),
    ("transformers:*.batched_mm", "experts.only_expert", "dw", "hf-batched-gradient"),
    ("transformers:*.batched_mm", "experts.shifted", "dw", "hf-batched-gradient"),
    ("transformers:*.batched_mm", "experts.deep", "dw", "hf-batched-gradient"),
    ("transformers:*.batched_mm", "experts.whole", "dw", "hf-batched-gradient"),
    ("transformers:*.batched_mm", "layer.*", "dw", "hf-batched-gradient"),
    ("transformers:*.batched_mm", "determinism.*", "dw", "hf-batched-gradient"),
    ("transformers:*.losses", "layer.no_tokens", "aux_loss", "hf-loss-empty"),
    ("transformers:*", "losses.aux_parts", "nan, expected 0", "hf-loss-empty"),
    ("transformers:*.losses", "layer.*", "aux_loss", "hf-loss-dtype"),
    ("transformers:*.losses", "layer.*", "dgate_ED", "hf-loss-dtype"),
    ("transformers:*.losses", "determinism.*", "aux_loss", "hf-loss-dtype"),
    ("transformers:*.losses", "determinism.*", "dgate_ED", "hf-loss-dtype"),
    ("transformers:*", "layer.*", "bits of", "hf-sum"),
    ("torchtitan:moe", "*", "expected m1 and m2 to have the same dtype", "titan-gate"),
    ("torchtitan:*", "experts.*", "y", "titan-bfloat16"),
    ("torchtitan:*", "*.strided", "view size is not compatible", "titan-view"),
    ("torchtitan:*", "*.sliced", "view size is not compatible", "titan-view"),
    ("torchtitan:*", "dispatch.*backward", "dx", "titan-dispatch-gradient"),
    ("torchtitan:*", "determinism.dispatch_backward", "dx", "titan-dispatch-gradient"),
    ("torchtitan:*", "layer.*", "bits of dx", "titan-dispatch-gradient"),
    ("torchtitan:*", "experts.one_expert", "dw1_EFD", "titan-bfloat16"),
    ("torchtitan:*", "experts.backward_sweep", "dw1_EFD", "titan-bfloat16"),
    ("torchtitan:*", "determinism.experts", "y_RD", "titan-bfloat16"),
    ("torchtitan:*", "layer.integers", "dw1_EFD", "titan-bfloat16"),
    ("torchtitan:*", "combine.*", "y:", "titan-combine"),
    ("torchtitan:*", "layer.*", "y:", "titan-bfloat16"),
    ("torchtitan:*", "determinism.*", "y:", "titan-bfloat16"),
    ("megatron:core", "router.no_tokens", "cannot reshape", "megatron-no-tokens"),
    ("megatron:core", "router.topk_set", "", "megatron-rounded-scores"),
    ("megatron:core", "router.backward", "", "megatron-rounded-scores"),
    ("megatron:core", "dispatch.capacity*", "", "megatron-position"),
    ("megatron:core", "dispatch.long_capacity*", "", "megatron-position"),
    ("megatron:core", "combine.*", "", "megatron-combine"),
    ("megatron:core", "*.*z*", "bfloat16, expected float32", "megatron-z"),
    ("megatron:core", "losses.*", "division by zero", "megatron-no-tokens"),
    ("megatron:core", "losses.z_parts", "nan, expected 0", "megatron-no-tokens"),
    ("megatron:core", "router.one_choice", "pre-softmax", "megatron-one-choice"),
    ("megatron:core", "dispatch.only_expert", "pre-softmax", "megatron-one-choice"),
    ("megatron:core", "router.close_scores", "", "megatron-rounded-scores"),
    ("megatron:core", "router.all_chosen", "certainly scores less", "megatron-rounded-scores"),
    ("ling:*", "*.no_tokens", "cannot reshape", "ling-no-tokens"),
    ("ling:*", "layer.strided", "view size is not compatible", "ling-view"),
    ("ling:*", "layer.sliced", "view size is not compatible", "ling-view"),
    ("ling:*", "router.one_choice", "weights", "ling-one-choice"),
    ("ling:lite.inference", "*", "dw1_EFD", "ling-no-grad"),
    ("ling:lite.inference", "*", "requires no gradient", "ling-no-grad"),
)
"""Which finding of `docs/implementations.md` explains a verdict; the first that fits."""


def main() -> None:
    """Run, and write JSON and Markdown under `results/`."""
    parser = argparse.ArgumentParser(description="The conformance suite on other people's MoE code")
    parser.add_argument("--impl", action="append", default=[], help="globs, such as 'transformers:mixtral*'")
    parser.add_argument("--scale", choices=("tiny", "small"), default="tiny")
    parser.add_argument("--dtype", action="append", default=[])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    dtypes = options.dtype or ["float32", "bfloat16"]
    chosen = [name for name in ALL if any(fnmatchcase(name, glob) for glob in options.impl or ["*"])]
    tables: dict[str, Any] = {}
    absent: dict[str, str] = {}
    for name in chosen:
        results, why = run(name, options.scale, dtypes)
        if results is None:
            absent[name] = why
        else:
            tables[name] = summary(name, results)
        sys.stderr.write(f"{name}: {why or tables[name]['families']}\n")
    report = {
        "schema": "hal.benchmark/1", "name": "implementations", "machine": machine(), "scale": options.scale,
        "dtypes": dtypes, "libraries": {name: installed(name) for name in LIBRARIES},
        "implementations": tables, "left_out": absent,
    }  # fmt: skip
    stem = "implementations" if options.scale == "tiny" else f"implementations-{options.scale}"
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{stem}.json").write_text(json.dumps(report, indent=1) + "\n")
    text = markdown(report)
    (options.out / f"{stem}.md").write_text(text)
    sys.stdout.write(text)
    unexplained = [row for table in tables.values() for row in table["not_green"] if row["finding"] is None]
    sys.exit(1 if unexplained else 0)


def run(name: str, scale: str, dtypes: list[str]) -> tuple[list[dict[str, Any]] | None, str]:
    """Return the results of one implementation, or None and why there are none."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.json"
        arguments = [HAL, "conformance", "run", "--device", "cpu", "--scale", scale, "--json", str(path)]
        arguments += ["--impl", f"hal_conformance.adapters.{name}"]
        arguments += [f"--dtype={dtype}" for dtype in dtypes] + [f"--case={family}" for family in FAMILIES]
        done = subprocess.run(arguments, capture_output=True, text=True, check=False)
        if not path.exists():
            return None, (done.stderr or done.stdout).strip()[-300:]
        report = json.loads(path.read_text())
    if not report["results"]:
        return None, " ".join(str(entry) for entry in report["not_run"])[:300]
    return report["results"], ""


def summary(name: str, results: list[dict[str, Any]]) -> dict[str, Any]:
    """Count by family, and group what is not green by case, status and finding."""
    families: dict[str, Counter[str]] = {family: Counter() for family in FAMILIES}
    groups: dict[tuple[str, str, str | None], dict[str, Any]] = {}
    for row in results:
        status = row["status"]
        colour = "green" if status in GREEN else "not judged" if status in NEUTRAL else status
        families[row["family"]][colour] += 1
        if colour in ("green", "not judged"):
            continue
        case, _, preset = row["case"].partition("[")
        finding = reason(name, case, row["detail"])
        group = groups.setdefault(
            (case, status, finding),
            {"case": case, "status": status, "finding": finding, "results": 0, "dtypes": [], "presets": [],
             "detail": row["detail"][:160]},
        )  # fmt: skip
        group["results"] += 1
        for key, value in (("dtypes", row["dtype"]), ("presets", preset.rstrip("]"))):
            if value not in group[key]:
                group[key].append(value)
    return {"families": {f: dict(c) for f, c in families.items()}, "not_green": list(groups.values())}


def reason(name: str, case: str, detail: str) -> str | None:
    """Return the finding that explains a verdict."""
    for implementation, glob, part, finding in REASONS:
        if fnmatchcase(name, implementation) and fnmatchcase(case, glob) and part in detail:
            return finding
    return None


def installed(name: str) -> str | None:
    """Return the version of a library, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def markdown(report: dict[str, Any]) -> str:
    """Return the table of blocks and families, and one row for each kind of verdict that is not green."""
    libraries = ", ".join(f"{name} {found}" for name, found in report["libraries"].items() if found)
    lines = [
        f"# Implementations at scale {report['scale']}, {', '.join(report['dtypes'])}", "",
        f"{libraries}. Green results, of how many judged where some are not; a dot where nothing could be judged.", "",
        "| implementation | " + " | ".join(FAMILIES) + " | not green |", "|---|" + "---|" * (len(FAMILIES) + 1),
    ]  # fmt: skip
    for name, table in report["implementations"].items():
        cells = []
        for family in FAMILIES:
            counts = table["families"][family]
            judged = sum(count for colour, count in counts.items() if colour != "not judged")
            green = counts.get("green", 0)
            cells.append("·" if not judged else f"{green}" if green == judged else f"**{green}** of {judged}")
        findings = sorted({row["finding"] or "?" for row in table["not_green"]})
        lines.append(f"| {name} | {' | '.join(cells)} | {', '.join(findings)} |")
    columns = ("finding", "implementation", "case", "verdict", "results", "dtypes", "first")
    lines += ["", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    rows: dict[str, list[str]] = defaultdict(list)
    for name, table in report["implementations"].items():
        for row in table["not_green"]:
            finding = row["finding"] or "?"
            detail = row["detail"].replace("|", "/")
            rows[finding].append(
                f"| {finding} | {name} | {row['case']} | {row['status']} | {row['results']} | "
                f"{', '.join(row['dtypes'])} | {detail} |"
            )
    lines += [line for finding in sorted(rows) for line in rows[finding]]
    if report["left_out"]:
        lines += ["", *(f"Left out: {name}: {why}" for name, why in report["left_out"].items())]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
