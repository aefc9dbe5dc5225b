"""The model card of a saved model: a README with the front matter that the Hugging Face Hub reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from jbrprune.errors import ArgumentError
from jbrprune.report.report import Report
from jbrprune.report.text import headline

CARD = "README.md"
LIBRARY = "jbrprune"
_MARK = f"library_name: {LIBRARY}"


def model_card(report: Mapping[str, Any], base: str | None) -> str:
    """Front matter, how to load the model, and its report.

    Args:
        report: What ``Report.to_dict`` made; empty if there is none.
        base: timm's name of the dense model; None for other models.
    """
    try:
        run = Report.from_dict(report) if report else None
    except ArgumentError:
        run = None  # of another tool: the card does without
    dense = f"`{base}`" if base else "a model of your own"
    advice = "" if base else ", model=dense"
    parts = [
        f"---\n{_front_matter(run, base)}---",
        f"# {base or (run.model if run else 'A pruned model')}, pruned",
        headline(run) + "." if run else "",
        f"Pruned from {dense} with {LIBRARY}, without labels and without training.",
        f'```python\nimport jbrprune\n\nmodel = jbrprune.load("hf-hub:USER/NAME"{advice})  # or the path of this '
        "folder\n```",
        f"## Report\n\n````text\n{run}\n````" if run else "",
        _provenance(run),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def is_card(text: str) -> bool:
    """Whether a README was made here, so that it may be replaced."""
    return text.startswith("---\n") and _MARK in text.split("\n---", 1)[0]


def _front_matter(run: Report | None, base: str | None) -> str:
    lines = [_MARK, "pipeline_tag: image-classification"]
    lines += ["tags:", *(f"- {tag}" for tag in ("image-classification", "pruning", LIBRARY, *["timm"] * bool(base)))]
    if base:
        name = base.removeprefix("hf-hub:").removeprefix("hf_hub:")
        lines.append(f"base_model: {_quoted(name if '/' in name else f'timm/{name}')}")
    if run is None or run.final is None:
        return "\n".join(lines) + "\n"
    found = {"top-1 agreement with the dense model": run.final.top1, "accuracy": run.final.accuracy}
    measured = {name: value for name, value in found.items() if value is not None}
    lines += ["metrics:", "- accuracy", "model-index:", f"- name: {_quoted(f'{run.model}, pruned')}", "  results:"]
    lines += ["  - task:", "      type: image-classification", "    dataset:", "      type: held-out"]
    lines += [f"      name: {_quoted(run.heldout or 'held-out images')}", "    metrics:"]
    for name, value in measured.items():
        lines += ["    - type: accuracy", f"      name: {_quoted(name)}", f"      value: {value:.6g}"]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """A string of JSON, which is one of YAML whatever is in it."""
    return json.dumps(text)


def _provenance(run: Report | None) -> str:
    if run is None or not run.provenance:
        return ""
    rows = "\n".join(f"| {_cell(name)} | {_cell(value)} |" for name, value in run.provenance.items())
    return f"## Provenance\n\n| | |\n|---|---|\n{rows}"


def _cell(value: object) -> str:
    text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, Mapping) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
