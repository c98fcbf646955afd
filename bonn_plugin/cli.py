"""The command ``bonn``. A user's mistake prints one line and exits with status 2."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from bonn_plugin.errors import BonnError, Followed

if TYPE_CHECKING:  # torch and timm take seconds to import: not for a help text or a typo
    from bonn_plugin.check import Forecast
    from bonn_plugin.recipe import Recipe
    from bonn_plugin.train import Runner

app = typer.Typer(
    help="1-bit convolutional networks by recipe.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
INTERRUPTED = 130
USAGE_ERROR: Any = typer.BadParameter.__base__
"""What an option's mistake raises, of whichever click typer carries."""
console = Console(highlight=False, soft_wrap=True)

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file, or a name of `bonn recipes`.")]
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint folder.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a setting, such as training.epochs=2. May be repeated."),
]
SelfTestSamples = Annotated[int, typer.Option("--samples", min=1, help="Test images to compare an export on.")]
ImageSize = Annotated[str | None, typer.Option("--size", metavar="HxW", help="Image size; default the recipe's.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]


class ConsoleProgress:
    """A bar on a terminal; elsewhere one line an epoch."""

    def line(self, text: str) -> None:
        """Print a line that stays."""
        console.print(text, markup=False)

    def steps(self, batches: Iterable[Any], epoch: int, epochs: int, total: int) -> Iterator[Any]:
        """Pass ``batches`` on; on a terminal show a bar that goes away at the end."""
        if not console.is_terminal:
            yield from batches
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            yield from bar.track(batches, total=total, description=f"epoch {epoch + 1}/{epochs}")


@app.command()
def compress(
    recipe: RecipeName,
    out: Annotated[Path | None, typer.Option(help="Where to put it; default runs/NAME.")] = None,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run that DIR holds.")] = False,
    device: Device = "auto",
    checkpoint_every: Annotated[
        int | None, typer.Option(min=1, metavar="STEPS", help="Save a state after so many steps, besides each epoch's.")
    ] = None,
    rank_timeout: Annotated[
        float, typer.Option(min=1, metavar="SECONDS", help="Under torchrun: when a process counts as dead or hanging.")
    ] = 600.0,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write event files into DIR/tensorboard.")] = False,
    log_distributions: Annotated[
        bool, typer.Option("--log-distributions", help="Write how the latent weights lie into DIR/distributions.jsonl.")
    ] = False,
    log_distributions_every: Annotated[
        int | None, typer.Option(min=1, metavar="EPOCHS", help="How often; default after each epoch.")
    ] = None,
) -> None:
    """Train as the recipe says, pack, save, verify and report.

    What the recipe starts from or learns from by {recipe: NAME} is trained first, in folders beside DIR, unless it is
    finished there; an interrupted one goes on by itself. --set changes RECIPE alone, none of the earlier ones.

    Under torchrun the processes train together; the batch size of the recipe is that of all of them.
    """
    from bonn_plugin.train import (
        LogOptions,
        Quiet,
        Runner,
        Stopped,
        StopRequest,
        check_free,
        choose_device,
        earlier_runs,
        open_world,
    )

    if log_distributions_every is not None and not log_distributions:
        raise BonnError("--log-distributions-every says how often --log-distributions writes: give both")
    logs = LogOptions(tensorboard, (log_distributions_every or 1) if log_distributions else None)
    loaded = _load(recipe, overrides)
    folder = out or Path("runs") / loaded.name
    again = ["bonn", "compress", recipe, "--out", str(folder)]
    again += [part for override in overrides or [] for part in ("--set", override)]
    again += [] if device == "auto" else ["--device", device]
    again += [] if checkpoint_every is None else ["--checkpoint-every", str(checkpoint_every)]
    again += ["--tensorboard"] if tensorboard else []
    again += ["--log-distributions"] if log_distributions else []
    again += [] if log_distributions_every is None else ["--log-distributions-every", str(log_distributions_every)]
    place = choose_device(device)
    earlier = list(earlier_runs(loaded, folder))
    world = open_world(place, rank_timeout)
    progress = ConsoleProgress() if world.leads else Quiet()
    stop, runner = StopRequest(), None
    try:
        with stop.listening(), world.naming_faults():
            if not resume and world.leads:
                check_free(folder)
            for run in earlier:
                run.complete(place, progress, world, checkpoint_every, stop, logs)
            runner = Runner(loaded, folder, place, progress, world, logs)
            runner.train(resume=resume, checkpoint_every=checkpoint_every, stop=stop)
            world.close()
            if not world.leads:
                return
            with stop.urgent():
                outcome = runner.finish()
    except (KeyboardInterrupt, Stopped) as reason:
        if world.leads:
            named = "stopped by SIGTERM" if isinstance(reason, Stopped) else "interrupted"
            done = _so_far(runner, again, loaded.training.epochs, resume)
            console.print(f"{named}; {done}", markup=False)
        sys.exit(0 if isinstance(reason, Stopped) else INTERRUPTED)
    from bonn_plugin.checkpoint import verify_packed
    from bonn_plugin.report import to_terminal

    console.print(to_terminal(outcome.report, details=False))
    console.print(_verified(folder, verify_packed(folder)), markup=False)
    console.print(f"the whole report: bonn report {folder}", markup=False)


@app.command()
def check(
    recipe: Annotated[str | None, typer.Argument(metavar="[RECIPE]", help="A recipe, as in `bonn compress`.")] = None,
    overrides: Overrides = None,
    model: Annotated[str | None, typer.Option(help="Instead of a recipe: any network of timm, by name.")] = None,
    num_classes: Annotated[int | None, typer.Option(min=2, help="With --model: outputs; default 1000.")] = None,
    size: Annotated[str | None, typer.Option(metavar="HxW", help="With --model: default what timm states.")] = None,
) -> None:
    """Show what a recipe would do: layers, windows, the compression rate to expect. No training."""
    from bonn_plugin.check import forecast, forecast_model
    from bonn_plugin.recipe import earlier_recipes, recipe_model
    from bonn_plugin.report import Rule

    if (recipe is None) == (model is None):
        raise BonnError("bonn check needs a recipe or --model NAME" + ("" if model is None else ", not both"))
    if model is not None:
        if overrides:
            raise BonnError("--set changes a recipe; with --model there is none")
        seen = forecast_model(model, num_classes or 1000, None if size is None else _size(size))
        console.print(f"{model}: {seen.parameters:,} parameters", markup=False)
        _show(seen, None)
        return
    assert recipe is not None
    for option, value in (("--num-classes", num_classes), ("--size", size)):
        if value is not None:
            raise BonnError(f"{option} goes with --model; a recipe states its own")
    loaded = _load(recipe, overrides)
    for earlier in earlier_recipes(loaded):
        rate = forecast(earlier, recipe_model(earlier)).book.rate()
        console.print(
            f"before it: {earlier.name}, {earlier.training.epochs} epochs, in a folder beside its own; "
            f"rate by {Rule.PARAMETERS} {rate:.2f}",
            markup=False,
        )
    seen = forecast(loaded, recipe_model(loaded))
    console.print(f"{loaded.name}: {loaded.model.name}, {seen.parameters:,} parameters", markup=False)
    _show(seen, loaded.training.epochs)


@app.command()
def evaluate(
    folder: Folder,
    overrides: Overrides = None,
    device: Device = "auto",
    engine: Annotated[str, typer.Option(help="torch, or openvino for the folder's export.")] = "torch",
) -> None:
    """Measure a packed checkpoint on the test set of its recipe: accuracy, or mAP of a detector."""
    from bonn_plugin.train import choose_device, evaluate_export
    from bonn_plugin.train import evaluate as run

    recipe = _carried(folder, overrides)
    if engine == "torch":
        found = run(folder, recipe, choose_device(device))
    elif engine == "openvino":
        found = evaluate_export(folder, recipe)
    else:
        raise BonnError(f"unknown engine {engine!r}: torch or openvino")
    by = "" if engine == "torch" else f" by {engine}"
    console.print(f"{folder}{by}: {found.words} on {found.samples:,} test samples", markup=False)


@app.command()
def verify(folder: Folder, samples: SelfTestSamples = 64) -> None:
    """Check a checkpoint's checksums and outputs, and those of its export if it has one."""
    from bonn_plugin.checkpoint import load_packed, verify_packed
    from bonn_plugin.export.openvino import has_export, read_info, verify_export

    console.print(_verified(folder, verify_packed(folder)), markup=False)
    if has_export(folder):
        from bonn_plugin.export.samples import samples_for

        shape = read_info(folder).input_shape
        images = samples_for(folder, shape[1:], samples)
        found = verify_export(load_packed(folder), folder, images, images.source)
        console.print(f"verified {folder}/openvino: checksums right, {found}", markup=False)


@app.command()
def export(
    folder: Folder,
    to: Annotated[str, typer.Option(help="The engine: openvino.")] = "openvino",
    batch: Annotated[int, typer.Option(min=1, help="Images a call; the graph is made for this number.")] = 1,
    size: ImageSize = None,
    half: Annotated[bool, typer.Option("--half", help="Store real weights as float16.")] = False,
    samples: SelfTestSamples = 64,
) -> None:
    """Write a checkpoint for an engine that computes with bits, and prove that it computes the same."""
    from bonn_plugin.checkpoint import load_packed
    from bonn_plugin.export.openvino import BIN, export_openvino
    from bonn_plugin.export.samples import input_shape_for, samples_for

    if to != "openvino":
        raise BonnError(f"unknown engine {to!r}: openvino")
    image = input_shape_for(folder, None if size is None else _size(size))
    images = samples_for(folder, image, samples)
    shape = (batch, *image)
    info = export_openvino(load_packed(folder), folder, shape, images, source=images.source, half=half)
    by_bits = sum(path == "bits" for path in info.binary_layers.values())
    written = (folder / "openvino" / BIN).stat().st_size
    console.print(
        f"{folder}/openvino: input {' x '.join(map(str, shape))}, {by_bits} of {len(info.binary_layers)} binary "
        f"convolutions computed with bits, model.bin {written:,} bytes",
        markup=False,
    )
    if info.part:
        console.print(
            f"the {info.part}, {len(info.outputs)} levels: scaling, padding to {image[1]}x{image[2]} and heads stay in "
            "torch; an image that is larger once scaled is refused",
            markup=False,
        )
    for name, path in info.binary_layers.items():
        if path != "bits":
            console.print(f"{name}: the engine has no binary convolution of this shape: {path}", markup=False)
    for line in _real_rest(info.real_layers):
        console.print(line, markup=False)
    console.print(f"self-test: {info.self_test}", markup=False)


@app.command()
def bench(
    folder: Folder,
    out: Annotated[Path | None, typer.Option(help="Where to write bench.json, .md and .png; default DIR.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images a call for the throughput.")] = 8,
    size: ImageSize = None,
    seconds: Annotated[float, typer.Option(min=0.01, help="Measuring time of each engine and setting.")] = 2.0,
    torch_compile: Annotated[bool, typer.Option(help="Measure torch.compile too; it compiles for minutes.")] = True,
    memory: Annotated[bool, typer.Option(help="Measure peak memory too, in a process for each engine.")] = True,
) -> None:
    """Measure speed, file sizes and memory of a checkpoint against the same network in full precision and int8."""
    from bonn_plugin.export.bench import run_bench
    from bonn_plugin.export.bench_report import to_terminal, write_bench
    from bonn_plugin.export.samples import input_shape_for

    found = run_bench(
        folder,
        input_shape_for(folder, None if size is None else _size(size)),
        batch=batch,
        seconds=seconds,
        torch_compile=torch_compile,
        memory=memory,
        tell=lambda text: console.print(text, markup=False),
    )
    console.print(to_terminal(found))
    for line in write_bench(out or folder, found):
        console.print(line, markup=False)


@app.command()
def report(
    folder: Folder,
    form: Annotated[str, typer.Option("--format", help="terminal, markdown or json.")] = "terminal",
    plots: Annotated[bool, typer.Option("--plots", help="Draw PNG pictures into DIR; needs matplotlib.")] = False,
    html: Annotated[bool, typer.Option("--html", help="Write DIR/report.html, one page with all figures.")] = False,
    against: Annotated[
        Path | None, typer.Option(metavar="DIR2", help="With --html: another run to compare weights and accuracy with.")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Show the report of a checkpoint, write it as a page; draw how its filters merged, and what a detector finds."""
    from bonn_plugin.report import read_report, to_markdown, to_terminal

    if form not in ("terminal", "markdown", "json"):
        raise BonnError(f"unknown format {form!r}: terminal, markdown or json")
    if against is not None and not html:
        raise BonnError("--against goes with --html: the page shows both runs")
    loaded = read_report(folder)
    written = [f"written: {_page(folder, against)}"] if html else []
    if plots:
        written += _drawn(folder, overrides)
    if form == "terminal":
        console.print(to_terminal(loaded))
    else:
        sys.stdout.write(to_markdown(loaded) if form == "markdown" else loaded.model_dump_json(indent=1) + "\n")
    for line in written:
        print(line, file=sys.stderr)


@app.command()
def compare(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN RUN ...", help="Folders of finished runs.")],
    form: Annotated[str, typer.Option("--format", help="terminal, markdown or json.")] = "terminal",
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the Pareto fronts, .png or .svg; needs matplotlib.")
    ] = None,
) -> None:
    """Show runs side by side: accuracy, bits, OPs, speed, differences to the first, spreads over seeds."""
    from bonn_plugin.compare import check_plot, compare_runs, to_markdown, to_terminal, write_plot

    if form not in ("terminal", "markdown", "json"):
        raise BonnError(f"unknown format {form!r}: terminal, markdown or json")
    if plot is not None:
        check_plot(plot)
    found = compare_runs(folders)
    if form == "terminal":
        console.print(to_terminal(found))
    else:
        sys.stdout.write(to_markdown(found) if form == "markdown" else found.model_dump_json(indent=1) + "\n")
    if plot is not None:
        write_plot(found, plot)
        print(f"drawn: {plot}", file=sys.stderr)


@app.command()
def recipes(name: Annotated[str | None, typer.Argument(help="Print this recipe.")] = None) -> None:
    """List the shipped recipes, or print one."""
    from bonn_plugin.shipped import find_recipe, shipped_recipes

    if name is not None:
        sys.stdout.write(find_recipe(name).read_text(encoding="utf-8"))
        return
    table = Table("recipe", "what")
    for key, path in shipped_recipes().items():
        first = path.read_text(encoding="utf-8").splitlines()[0]
        table.add_row(key, first.removeprefix("#").strip())
    console.print(table)


def main() -> None:
    """Run the command; turn a ``BonnError`` into one line and exit status 2."""
    _quiet()
    try:
        status = app(standalone_mode=False)  # else an option's mistake takes a box of six lines
        if status == INTERRUPTED:  # typer's word for a Ctrl-C that no command answered
            print("interrupted", file=sys.stderr)
        sys.exit(status or 0)
    except USAGE_ERROR as error:
        place = error.ctx.command_path if error.ctx else "bonn"
        message = error.format_message().rstrip(".")
        if message:  # empty where the help was shown
            print(f"{place}: {message} (see {place} --help)", file=sys.stderr)
        sys.exit(2)
    except Followed:  # process 0 tells it
        sys.exit(2)
    except BonnError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        print(f"{error.filename}: {error.strerror}" if error.filename else error, file=sys.stderr)
        sys.exit(2)


def _quiet() -> None:
    import warnings

    warnings.filterwarnings("ignore", module="torch.utils.data", message=".*pin_memory.*")


def _show(seen: Forecast, epochs: int | None) -> None:
    """Print a forecast; with the windows of its modifiers in so many epochs."""
    from bonn_plugin.report import Rule

    table = Table("layer", "weight", "input", title="binarised", title_justify="left")
    for layer in seen.layers:
        table.add_row(layer.name, " x ".join(map(str, layer.shape)), layer.remark)
    console.print(table)
    alone = Table("convolution", "why", title="left in full precision", title_justify="left")
    for left in seen.left_alone:
        alone.add_row(left.name, left.reason)
    console.print(alone)
    if epochs is not None:
        windows = Table("modifier", "epochs", "", title=f"over {epochs} epochs", title_justify="left")
        for window in seen.windows:
            windows.add_row(window.type, f"{window.epochs.start} to {window.epochs.stop}", _bar(window.epochs, epochs))
        console.print(windows)
    if seen.passed:
        passed = Table("layer", "pass", title="after the training", title_justify="left")
        for row in seen.passed:
            passed.add_row(row.name, row.type)
        console.print(passed)
    for rule in Rule:
        of_part = f", of {seen.part} alone {seen.book.within(seen.part).rate(rule):.2f}" if seen.part else ""
        console.print(f"compression rate by {rule}: {seen.book.rate(rule):.2f}{of_part}")
    console.print(f"tensors on disk: about {seen.book.written_bytes:,} bytes, float32 {4 * seen.parameters:,}")
    console.print(f"OPs for one image: {seen.after.ops:.3e} (float32 {seen.before.ops:.3e})")
    if seen.merged:
        total = seen.merged.total
        console.print(
            f"filters: {total.outputs:,}, merged to {total.stored:,}; without merging the rate by {Rule.PARAMETERS} "
            f"is {seen.merged.book.rate():.2f}, OPs {seen.merged.macs.ops:.3e}"
        )


def _load(name: str, overrides: list[str] | None) -> Recipe:
    from bonn_plugin.recipe import load_recipe
    from bonn_plugin.shipped import find_recipe

    return load_recipe(find_recipe(name), overrides or [])


def _so_far(runner: Runner | None, again: list[str], epochs: int, resume: bool) -> str:
    """Return what an interrupted run has saved, and the command that goes on."""
    saved = "nothing is saved yet"
    if runner is None:
        saved = "in a run that comes before, which keeps what it has saved"
        again = [*again, "--resume"] if resume else again
    elif runner.saved or runner.saved_steps:
        steps = f" and {runner.saved_steps} steps" if runner.saved_steps else ""
        saved = f"{runner.saved} of {epochs} epochs{steps} are saved"
        again = [*again, "--resume"]
    return f"{saved}. Go on with: {shlex.join(again)}"


def _carried(folder: Path, overrides: list[str] | None) -> Recipe:
    from bonn_plugin.checkpoint import load_recipe_of
    from bonn_plugin.recipe import parse_recipe

    text = load_recipe_of(folder)
    if text is None:
        raise BonnError(f"{folder}: the checkpoint carries no recipe, so its data set is not known")
    return parse_recipe(text, str(folder / "recipe.yaml"), overrides or [])


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise BonnError(f"--size {text!r} is not HxW, such as 224x224")
    return int(height), int(width)


def _real_rest(layers: Mapping[str, str]) -> list[str]:
    """Return a line for each way in which the layers that are not binary are expressed."""
    by_way: dict[str, list[str]] = {}
    for name, way in layers.items():
        by_way.setdefault(way, []).append(name)
    words = {"int8": "computed in int8", "float32": "left in float32"}
    return [f"{words.get(way, f'computed in {way}')}: {', '.join(names)}" for way, names in by_way.items()]


def _page(folder: Path, against: Path | None) -> Path:
    from bonn_plugin.report import RunFiles, write_page
    from bonn_plugin.train import METRICS

    return write_page(
        RunFiles(folder, folder / METRICS), None if against is None else RunFiles(against, against / METRICS)
    )


def _drawn(folder: Path, overrides: list[str] | None) -> list[str]:
    from bonn_plugin.checkpoint import model_config_of
    from bonn_plugin.report import write_plots
    from bonn_plugin.train import METRICS, draw_detections

    drawn = write_plots(folder / METRICS, folder)
    if model_config_of(folder).task == "detection":
        drawn.append(draw_detections(folder, _carried(folder, overrides)))
    return [f"drawn: {file}" for file in drawn] or ["nothing to draw: no filters were merged in this run"]


def _verified(folder: Path, found: Any) -> str:
    logits = (
        "logits equal bit for bit" if found.identical else f"logits within {found.difference:.2g} of those at saving"
    )
    return f"verified {folder}: {found.tensors} tensors, {found.bytes:,} bytes, checksums right, {logits}"


def _bar(window: range, epochs: int) -> str:
    width = 40
    first = window.start * width // epochs
    last = max(first + 1, -(-window.stop * width // epochs))
    return "." * first + "#" * (last - first) + "." * (width - last)


if __name__ == "__main__":
    main()
