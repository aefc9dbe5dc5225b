"""The command line. Its options are made from tables: those of `jbrprune.pruning.options`, and a few of its own."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, make_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import torch
import typer
from rich.console import Console
from rich.logging import RichHandler
from torch import nn

from jbrprune.budgets.budget import Floors
from jbrprune.budgets.cost import count_macs
from jbrprune.checkpoint.checkpoint import check_target, describe, load
from jbrprune.checkpoint.export import export
from jbrprune.criteria.objectives import OBJECTIVES
from jbrprune.criteria.relevance import PRESETS, Relevance
from jbrprune.data import distributed
from jbrprune.data.batches import class_indices
from jbrprune.data.files import check_file
from jbrprune.data.images import open_data
from jbrprune.errors import ArgumentError, JBRError
from jbrprune.evaluation.agreement import Agreement, agreement, compute_logits, parameters_of
from jbrprune.evaluation.latency import time_in_turns
from jbrprune.evaluation.outputs import LOGITS
from jbrprune.models.timm_models import create
from jbrprune.prediction.predict import predict
from jbrprune.pruning.api import PruneResult, info, prune, score, sparsify
from jbrprune.pruning.options import ChannelOptions, Options, ScoreOptions, Table, WeightOptions, option, whole
from jbrprune.pruning.prepare import check_runs
from jbrprune.report.records import import_optional, plain
from jbrprune.report.text import format_si, format_table, make_pairs, make_table
from jbrprune.sparsity.masks import make_permanent

app = typer.Typer(
    help="Make trained vision models smaller, without labels and without training.\n\n"
    "Start with `jbrprune demo`, then `jbrprune info MODEL`, then "
    "`jbrprune prune MODEL --data FOLDER --macs 0.5 --out DIR`.\n\n"
    "Exit codes: 0 done, 1 the model, data or files cannot be used, 2 wrong arguments, 130 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
PANELS = ("Budget", "Criterion", "Repair", "Data", "Model", "Output")
FLAGS = {(Floors, "share"): "floor", (Floors, "channels"): "min_channels"}
"""Options of nested tables whose own name would say too little, or is another's."""
CHOICES = {"criterion": PRESETS, "objective": OBJECTIVES}


# --- options out of tables -----------------------------------------------------------------------


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Register a command; a parameter whose type is a table becomes one option for every field of the table."""
    parameters = inspect.signature(function, eval_str=True).parameters
    tables: Any = {name: each.annotation for name, each in parameters.items() if is_dataclass(each.annotation)}
    own = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for name, each in parameters.items() if name not in tables]
    options = [option for table in tables.values() for option in _make_options(table)]
    options.sort(key=lambda each: PANELS.index(get_args(each.annotation)[1].rich_help_panel))

    def run(**values: Any) -> None:
        read = {name: _read_table(table, values) for name, table in tables.items()}
        function(**{name: read[name] if name in read else values[name] for name in parameters})

    run.__doc__ = function.__doc__
    run.__signature__ = inspect.Signature([*own, *options])  # type: ignore[attr-defined]
    app.command(function.__name__.removesuffix("_command"))(run)
    return function


def _make_options(table: type, *, unset: bool = False) -> Iterator[inspect.Parameter]:
    """An option of typer for every field; nested tables are flattened, and a criterion can be changed by part.

    Args:
        table: The dataclass.
        unset: Whether no option has a default.
    """
    hints = get_type_hints(table)
    for item in fields(table):
        if item.metadata["panel"] is None:
            continue
        if is_dataclass(item.default):
            yield from _make_options(type(item.default))
            continue
        name, hint, default = FLAGS.get((table, item.name), item.name), hints[item.name], item.default
        flag = name.replace("_", "-")
        kind = next((kind for kind in (hint, *get_args(hint)) if kind in (bool, int, float, Path)), str)
        if any(get_origin(one) is Sequence for one in (hint, *get_args(hint))):
            kind, default = list[kind], [default] if default else None  # type: ignore[valid-type]
        choices = CHOICES.get(name) or (get_args(hint) if get_origin(hint) is Literal else ())
        made = typer.Option(
            f" /--no-{flag}" if default is True else f"--{flag}",
            help=item.metadata["help"] + (f" One of {', '.join(choices)}." if choices else ""),
            rich_help_panel=item.metadata["panel"],
            show_default=kind is not bool,
        )
        default = None if unset else inspect.Parameter.empty if default is ... else default
        annotation = Annotated[kind | None if default is None else kind, made]
        yield inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        if name == "criterion":
            yield from _make_options(Relevance, unset=True)


def _read_table(table: type, values: Mapping[str, Any]) -> Any:
    """Make a table, which checks itself, of the values on the command line."""
    given = {}
    for item in fields(table):
        value = values.get(FLAGS.get((table, item.name), item.name))
        if is_dataclass(item.default):
            given[item.name] = _read_table(type(item.default), values)
        elif item.metadata["panel"] is not None and value is not None:
            value = tuple(value) if isinstance(value, list) else value
            given[item.name] = None if (item.name, value) == ("repair", ("none",)) else value
    made = table(**given)
    names = [item.name for item in fields(Relevance) if item.metadata["panel"]] if hasattr(made, "criterion") else []
    changes = {name: values[name] for name in names if values[name] is not None}
    if "autocast" in changes:
        changes["autocast"] = getattr(torch, changes["autocast"], changes["autocast"])
    return replace(made, criterion=replace(made.ranking, **changes)) if changes else made


def _pick(table: type, *names: str, base: tuple[type, ...] = ()) -> Any:
    """Make a table of some of the options of another one."""
    hints, known = get_type_hints(table), {item.name: item for item in fields(table)}
    made = [(n, hints[n], field(default=known[n].default, metadata=known[n].metadata)) for n in names]
    return make_dataclass("Picked", made, bases=base, frozen=True)


# --- models, images, output ----------------------------------------------------------------------


@dataclass(frozen=True)
class ModelSource:
    """How the model is made."""

    checkpoint: str | None = option(None, "Local weights: .safetensors, or a .pth that holds weights only.", "Model")
    random: bool = option(False, "Random weights, in the place of timm's pretrained ones.", "Model")
    model_arg: Sequence[str] = option((), "Argument of timm.create_model, such as num_classes=10; repeatable.", "Model")
    device: str | None = option(None, "cpu, cuda, cuda:1, ...; by default cuda if there is one.", "Model")


@dataclass(frozen=True)
class Source(ModelSource):
    """How the model is made, and the images."""

    data: str = option(..., "Folder of images, with or without class folders, or a data set (hfds/...).", "Data")
    skip_corrupt: bool = option(False, "Leave out images that cannot be read, and say which.", "Data")


def _open_model(name: str, source: ModelSource) -> nn.Module:
    """The timm model of a name, or the model that was saved to a directory, in eval mode."""
    cuda = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"  # each rank its own
    try:
        device = torch.device(source.device or cuda)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ArgumentError(f"--device {source.device!r} cannot be used: {str(error).splitlines()[0]}") from error
    if Path(name).is_dir():
        return load(name).to(device)
    arguments: dict[str, Any] = {"pretrained": not source.random, "checkpoint": source.checkpoint}
    for pair in source.model_arg:
        key, separator, value = pair.partition("=")
        if not separator or not key.isidentifier():
            raise ArgumentError(f"--model-arg must be key=value, got {pair!r}.")
        arguments[key] = value
        with contextlib.suppress(json.JSONDecodeError):
            arguments[key] = json.loads(value)
    torch.manual_seed(0)  # random weights are the same every time
    return create(name, **arguments).eval().to(device)


def _open(name: str, source: Source, batch_size: int) -> tuple[nn.Module, object]:
    """The model and the images, prepared for it."""
    model = _open_model(name, source)
    return model, open_data(source.data, model, batch_size=batch_size, skip_corrupt=source.skip_corrupt)


@dataclass(frozen=True)
class Printing:
    """What is printed."""

    json: bool = option(False, "One JSON object on standard output, nothing else.", "Output")
    quiet: bool = option(False, "No progress bars and nothing on standard output.", "Output")


@dataclass(frozen=True)
class Writing(Printing):
    """Where the result is written."""

    out: Path | None = option(None, "Write here: a model's directory, scores (.safetensors), a table (.csv).", "Output")


@dataclass(frozen=True)
class Output(Writing):
    """What is written beside a model."""

    overwrite: bool = option(False, "Replace a model that was saved there.", "Output")
    card: bool = option(False, "Write a model card (README.md) beside the model, for the Hugging Face Hub.", "Output")
    report: Path | None = option(None, "Write the report as a self-contained page here (.html).", "Output")


def _shows_progress(printing: Printing) -> bool:
    """Whether to show progress: one rank does, to a terminal."""
    return distributed.rank() == 0 and not printing.json and not printing.quiet and sys.stderr.isatty()


def _say(printing: Printing, facts: Mapping[str, Any], text: str) -> None:
    """Print the facts as one JSON object, or the text; of several ranks, one does."""
    if distributed.rank() == 0 and not printing.quiet:
        typer.echo(json.dumps(facts) if printing.json else text)


# --- commands ------------------------------------------------------------------------------------

Model = Annotated[str, typer.Argument(help="A timm name such as resnet50, or a directory written by --out.")]


@command
def prune_command(model: Model, source: Source, options: ChannelOptions, output: Output) -> None:
    """Remove channels and heads of a model until a budget is met, and say what that cost.

    Example: `jbrprune prune resnet50 --data photos/ --macs 0.5 --out pruned/`
    """
    _carry_out(prune, model, source, options, output)


@command
def sparsify_command(model: Model, source: Source, options: WeightOptions, output: Output) -> None:
    """Set single weights of a model to zero, and say what that cost.

    Example: `jbrprune sparsify resnet50 --data photos/ --sparsity 0.9 --out sparse/`
    """
    _carry_out(sparsify, model, source, options, output)


def _carry_out(call: Callable[..., PruneResult], name: str, source: Source, options: Any, output: Output) -> None:
    """Prune, save, print."""
    if output.out is not None:
        check_target(output.out, overwrite=output.overwrite)
    if output.report is not None:
        check_file(output.report)
        import_optional("matplotlib.figure")
    model, data = _open(name, source, options.batch_size)
    given = vars(options) | {"progress": _shows_progress(output)}
    if options.eval_data is not None:
        given["eval_data"] = open_data(options.eval_data, model, skip_corrupt=source.skip_corrupt)
    result = call(model, data, **given)
    report = result.report
    if distributed.rank() == 0:
        if output.out is not None:
            result.save(output.out, card=output.card, overwrite=output.overwrite)
        if output.report is not None:
            report.to_html(output.report)
    facts = report.to_dict() | {"out": output.out and str(output.out)}
    _say(output, facts, f"{report}" + (f"\n\nSaved to {output.out}" if output.out else ""))


@dataclass(frozen=True)
class Shares:
    """The budgets of a prediction."""

    macs: Sequence[float] = option((), "Share of the MACs to keep; repeatable; by default 0.9 to 0.2.", "Budget")
    params: Sequence[float] = option((), "Share of the parameters to keep; repeatable.", "Budget")
    channels: Sequence[float] = option((), "Share of the removable channels to keep; repeatable.", "Budget")
    calibrate: bool = option(False, "Really prune to one budget to correct the curve.", "Budget")
    checked: int = option(64, "Images on which every budget is tried by masking.", "Data")


Predicting = _pick(ChannelOptions, "structure", "repair", "images", "seed", "floors", base=(Options,))
Listing = _pick(ChannelOptions, "structure", "ignore", "output", "floors")
SHOWN = ("target", "macs", "predicted_tpv", "predicted_flips", "valid", "predicted_flips_repaired", "masked_flips")
"""Columns of a prediction that fit on a screen; all of them are in ``--json`` and ``--out``."""


@command
def predict_command(model: Model, source: Source, shares: Shares, options: Predicting, output: Writing) -> None:  # type: ignore[valid-type]
    """Predict what pruning would cost, for every budget, before anything is cut.

    Example: `jbrprune predict resnet50 --data photos/ --macs 0.8 --macs 0.6`
    """
    check_file(output.out)
    module, data = _open(model, source, options.batch_size)
    given = {name: value for name, value in vars(shares).items() if value != ()} | vars(options)
    frame = predict(module, data, **given | {"progress": _shows_progress(output)})
    if output.out is not None:
        frame.to_csv(output.out, index=False)
    rows = plain(frame.to_dict("records"))
    content = make_table([{name.replace("_", "\n"): row[name] for name in SHOWN} for row in rows], left=0)
    note = "\n\nflips: share of images whose top-1 changes. masked flips are measured, uncut."
    decided = note * any(row["predicted_flips"] is not None for row in rows)
    _say(output, {"model": model, "rows": rows}, f"{model}\n\n{format_table(content)}{decided}")


@command
def score_command(model: Model, source: Source, options: ScoreOptions, output: Writing) -> None:
    """Score what could be removed, without removing anything.

    Example: `jbrprune score resnet50 --data photos/ --out scores.safetensors`
    """
    check_file(output.out)
    module, data = _open(model, source, options.batch_size)
    given: dict[str, Any] = vars(options) | {"progress": _shows_progress(output)}
    scores = score(module, data, **given)
    if output.out is not None and distributed.rank() == 0:
        scores.save(output.out)
    rows = [
        {"group": name, "units": v.numel()} | {key: getattr(v, key)().item() for key in ("min", "median", "max")}
        for name, v in scores.values().items()
    ]
    facts = {"model": model, "samples": scores.samples, "settings": plain(scores.settings), "groups": rows}
    title = f"{model}: scores of {scores.samples} images, {scores.settings.objective}, {scores.settings.statistic}"
    _say(output, facts, f"{title}\n\n{format_table(make_table(rows))}")


@dataclass(frozen=True)
class Comparing(Table):
    """What a model is measured on and compared with."""

    reference: str | None = option(None, "Timm name or directory of the dense model.", "Model")
    output: str | None = option(None, "What of the model's output counts, as for prune.", "Model")
    images: int | None = option(None, "Images to read; by default all.", "Data", whole(1))
    batch_size: int = option(32, "Images per pass.", "Data", whole(1))


@command
def eval_command(model: Model, source: Source, options: Comparing, printing: Printing) -> None:
    """Compare a pruned model with the dense one: agreement, cost, time, and accuracy if the folder has classes.

    Example: `jbrprune eval pruned/ --data validation/ --reference resnet50`
    """
    module, data = _open(model, source, options.batch_size)
    models = {} if options.reference is None else {"reference_": _open_model(options.reference, source)}
    models[""] = module
    how = options.images, options.batch_size, options.output
    found, example = measure_agreement([*models.values()], data, *how)
    if distributed.rank() > 0:
        return  # the others' work would disturb the timing
    timings = time_in_turns([*models.values()], example)
    facts: dict[str, Any] = {"model": model, "images": found.images}
    for (prefix, each), latency in zip(models.items(), timings.latencies):
        accuracy = found.dense_accuracy if prefix else found.accuracy
        facts |= {f"{prefix}macs": sum(count_macs(each, example).values()), f"{prefix}params": parameters_of(each)}
        facts |= {f"{prefix}latency_ms": latency.median_ms, f"{prefix}accuracy": accuracy}
    if options.reference is not None:
        facts |= {"reference": options.reference, "relative_latency": timings.ratios[1]}
        measured = plain(found)
        names = {"top1": "top1_agreement", "top5": "top5_agreement", "neighbours": "neighbour_agreement"}
        for name in ("top1", "top5", "kl", "iou", "neighbours", "cosine", "error", "errors"):
            facts |= {names.get(name, name): measured[name]} if measured[name] is not None else {}
    _say(printing, facts, format_table(make_pairs(facts)))


def measure_agreement(
    models: Sequence[nn.Module], data: object, images: int | None, batch_size: int, asked: str | None = None
) -> tuple[Agreement, torch.Tensor]:
    """The agreement of the last model with the first, and an image; each of several ranks reads its own part."""
    share, parts, example, output = distributed.Parts(data, batch_size=batch_size), [], torch.empty(0), LOGITS
    with distributed.fail_together():
        for start, batch in share:
            left = None if images is None else max(0, images - start)
            batch = batch.map(lambda tensor, left=left: tensor[:left])
            if len(batch) == 0:
                break
            output = output if parts else check_runs(models[0], batch.images, asked)
            with distributed.alone():
                wanted, found = (compute_logits(model, [batch], output)[0] for model in (models[0], models[-1]))
            labels = class_indices(batch.labels, batch.images.shape[:1], output.classes(wanted))
            parts.append((start, found, wanted, labels))
            example = batch.images[:1]
    if images is None:  # else the ranks stop at different places
        share.check()
    rows = sorted(itertools.chain(*distributed.gather(parts)), key=lambda part: part[0])
    _, found, wanted, labels = zip(*rows, strict=True)
    known = None if any(part is None for part in labels) else torch.cat(labels)
    return agreement(torch.cat(found), torch.cat(wanted), known, output), example


@command
def info_command(model: Model, source: ModelSource, options: Listing, printing: Printing) -> None:  # type: ignore[valid-type]
    """List what can be removed from a model, what it costs, and how far it can go. Needs no weights.

    Example: `jbrprune info vit_small_patch16_224`
    """
    found = info(_open_model(model, replace(source, random=source.checkpoint is None)), **vars(options))
    size = " x ".join(map(str, found.input_size))
    text = (
        f"{model}: {format_si(found.macs, unit='MACs')}, {format_si(found.params)} parameters at {size}.\n"
        f"{found.output}\n"
        f"It can go down to {found.least_macs:.1%} of the MACs and {found.least_params:.1%} of the parameters.\n\n"
        f"What can be removed\n\n{format_table(make_table([vars(row) for row in found.rows]))}\n\n"
        f"What keeps its width\n\n{format_table(make_pairs(found.skipped))}"
    )
    if found.uncounted:
        text += f"\n\nWhat is not counted\n\n{format_table(make_pairs(found.uncounted))}"
    _say(printing, {"model": model} | found.to_dict(), text)


@dataclass(frozen=True)
class Exporting(Printing):
    """Where a model is exported to."""

    out: Path = option(..., "File to write: .onnx, or .pt2 for torch.export.", "Output")


@command
def export_command(
    directory: Annotated[Path, typer.Argument(help="Directory that was written by --out.")], options: Exporting
) -> None:
    """Export a saved model to ONNX or torch.export; the file is kept only if it gives the same outputs.

    Example: `jbrprune export pruned/ --out pruned.onnx`
    """
    check_file(options.out)
    example = describe(directory).example
    export(make_permanent(load(directory)), options.out, size=example and example.size)
    facts = {"model": str(directory), "out": str(options.out), "bytes": options.out.stat().st_size}
    _say(options, facts, f"Wrote {options.out}: its outputs are those of the model.")


@command
def demo_command(
    out: Annotated[Path, typer.Option(help="Directory for the models, tables and figures.")] = Path("demo"),
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
) -> None:
    """Prune a real ImageNet model on photographs, and a small ResNet on digits, without a network connection.

    Example: `jbrprune demo --out demo`
    """
    from jbrprune.demo import run_demo

    run_demo(out, seed=seed, say=typer.echo)


def main() -> None:
    """Run the command line; known errors become one sentence and an exit code."""
    logging.basicConfig(
        level=logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=Console(stderr=True), show_path=False, show_time=False)],
    )
    try:
        with distributed.joined() if distributed.launched() else contextlib.nullcontext():
            app()
    except (JBRError, ImportError, OSError) as error:
        typer.secho(f"jbrprune: {error}", err=True, fg=typer.colors.RED)
        sys.exit(2 if isinstance(error, ArgumentError) else 1)
