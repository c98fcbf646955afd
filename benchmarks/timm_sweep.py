"""Every family of timm's models: binarise, train two steps, convert, save, load, compare the logits bit for bit.

Of each module below ``timm.models`` the smallest network by parameters that has plain convolutions and gives logits;
timm's own ``test_`` networks do not count. Writes docs/timm_support.md. Each family runs in a process of its own, with
a limit of time and memory; what is done already is kept in a file of lines, so that a sweep that was stopped goes on.

    python benchmarks/timm_sweep.py                 # all families
    python benchmarks/timm_sweep.py --only resnet   # print one; the page is left as it is
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import resource
import sys
import tempfile
import textwrap
import time
import warnings
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import timm
import torch
from torch import nn

from bonn_plugin import Session, ledger, load_packed, parse_recipe, save_packed
from bonn_plugin.errors import one_line
from bonn_plugin.models import build_model, build_outline
from bonn_plugin.modifiers import left_alone
from bonn_plugin.nn import BinaryConv2d

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "timm_support.md"
STATE = ROOT / "runs" / "timm_sweep.jsonl"
LARGEST = 150_000_000
"""Parameters beyond which a network is passed over."""
SIZES = (64, 96, 128)
"""Image sizes that are tried before a network's own, in pixels."""
FIXED = 256
"""Image size for which a network is made whose own is fixed and larger."""
CLASSES, BATCH, STEPS = 10, 2, 2
GIB = 2**30
PASSED, FAILED, NOT_APPLICABLE = "passed", "failed", "not applicable"
NO_LOGITS = "it gives features, no logits"

ABOUT = (
    "What `benchmarks/timm_sweep.py` found: of each module below `timm.models` the smallest network by parameters "
    f"(at most {LARGEST // 10**6} million) that has a plain convolution larger than 1x1 and gives logits; timm's "
    "`test_` networks do not count. It is prepared with `binarize` and `kernel_loss`, without selectors, trained for "
    "two steps, converted, saved and loaded again. It has passed if the logits after the reload are equal bit for "
    "bit, and those of the packed network near to those of the trained one. Where no network of a family has a plain "
    "convolution, the row counts those of the smallest. `bonn check --model NAME` answers for every other network."
)

RECIPE = """version: 1
name: sweep
model: {{name: {name}, num_classes: {classes}, args: {args}}}
data: {{name: imagefolder, root: ., crop: {size}}}
training: {{epochs: 1, batch_size: {batch}, optimizer: {{name: sgd, lr: 1e-4}}, schedule: {{name: constant}}}}
modifiers:
  - {{type: binarize}}
  - {{type: kernel_loss, lambda: 1e-4, nu: 1e-3}}
"""


@dataclass(frozen=True)
class Row:
    """What came of one family; ``left`` counts the convolutions left alone by their reasons."""

    family: str
    result: str
    reason: str = ""
    model: str = ""
    parameters: int = 0
    size: int = 0
    binarised: int = 0
    left: dict[str, int] = field(default_factory=dict)
    rate: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True)
class Member:
    """A network of a family, from its outline; ``plain`` are the convolutions that are not in ``left``."""

    name: str
    parameters: int
    plain: int
    left: dict[str, int]


def families() -> list[str]:
    """Return the modules below ``timm.models``, without those that this package registers."""
    return [family for family in timm.list_modules() if members_of(family)]


def members_of(family: str) -> list[str]:
    """Return the names of a family's networks, without timm's ``test_`` ones and this package's."""
    return [name for name in timm.list_models(module=family) if not name.startswith(("test_", "bonn_"))]


def members(family: str) -> list[Member]:
    """Return the members of a family by rising number of parameters; none of them takes memory."""
    found = []
    for name in members_of(family):
        outline = build_outline(name, CLASSES)
        counts = Counter(alone.reason for alone in left_alone(outline))
        plain = counts.pop("not selected", 0)
        found.append(Member(name, sum(p.numel() for p in outline.parameters()), plain, dict(counts)))
    return sorted(found, key=lambda member: (member.parameters, member.name))


def try_family(family: str) -> Row:
    """Run the smallest member that fits."""
    known = members(family)
    fitting = [m for m in known if m.plain and m.parameters <= LARGEST]
    if not fitting:
        large = next((m for m in known if m.plain), None)
        reason = "no plain convolution larger than 1x1"
        if large is not None:
            reason = f"the smallest with plain convolutions, {large.name}, has {large.parameters:,} parameters"
        return Row(family, NOT_APPLICABLE, reason, known[0].name, known[0].parameters, left=known[0].left)
    row = Row(family, FAILED, "no member was tried")
    for member in fitting[:4]:
        started = time.perf_counter()
        try:
            row = try_member(family, member)
        except Exception as error:
            row = Row(family, FAILED, f"{type(error).__name__}: {one_line(error)}", member.name, member.parameters)
        row = replace(row, seconds=round(time.perf_counter() - started, 1))
        if row.reason != NO_LOGITS:
            break
    return row


def try_member(family: str, member: Member) -> Row:
    """Prepare, train, convert, save, load and compare one network."""
    fitting = fitting_size(member.name)
    row = Row(family, FAILED, NO_LOGITS, member.name, member.parameters)
    if fitting is None:
        return row
    size, args = fitting
    torch.manual_seed(0)
    recipe = parse_recipe(RECIPE.format(name=member.name, classes=CLASSES, args=args, size=size, batch=BATCH))
    model = build_model(member.name, CLASSES, args)
    session = Session(recipe, STEPS)
    session.prepare(model)
    binarised = BinaryConv2d.names_in(model)
    left = Counter(alone.reason for alone in left_alone(model, torch.randn(BATCH, 3, size, size)))
    optimizer = torch.optim.SGD(session.param_groups(), lr=1e-4)
    for _ in range(STEPS):
        optimizer.zero_grad()
        y = torch.randint(CLASSES, (BATCH,))
        logits = model(torch.randn(BATCH, 3, size, size))
        loss = nn.functional.cross_entropy(logits, y) + session.loss(labels=y).total
        loss.backward()
        optimizer.step()
        session.step()
    model.eval()
    packed = session.convert()
    probe = torch.randn(BATCH, 3, size, size)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        trained, before = model(probe), packed(probe)
        save_packed(packed, folder, recipe)
        after = load_packed(folder)(probe)
    row = replace(row, size=size, binarised=len(binarised), left=dict(left), rate=round(ledger(packed).rate(), 2))
    if not torch.isfinite(before).all():
        return replace(row, reason="the logits are not finite")
    if not torch.equal(before, after):
        return replace(row, reason=f"logits differ by {float((before - after).abs().max()):.3g} after the reload")
    if not torch.allclose(trained, before, rtol=1e-3, atol=1e-4 * float(trained.abs().max())):
        return replace(row, reason=f"logits differ by {float((trained - before).abs().max()):.3g} after convert")
    return replace(row, result=PASSED, reason="")


def fitting_size(name: str) -> tuple[int, dict[str, int]] | None:
    """Return the smallest image size that is tried at which the full-precision network trains, and its arguments.

    None if it gives no logits.
    """
    settings = timm.get_pretrained_cfg(name)
    own = settings.input_size[-1]
    ways: list[tuple[int, dict[str, int]]] = [(own, {})]
    if not settings.fixed_input_size:
        ways = [*((size, {}) for size in SIZES if size < own), *ways]
    elif own > FIXED:
        ways = [(FIXED, {"img_size": FIXED}), *ways]
    for size, args in ways:
        try:
            model = build_model(name, CLASSES, args).train()
            with torch.no_grad():
                logits = model(torch.randn(BATCH, 3, size, size))
        except Exception:
            if size == own:
                raise
            continue
        fits = isinstance(logits, torch.Tensor) and logits.shape == (BATCH, CLASSES)
        return (size, args) if fits else None
    return None


def child(family: str, memory: int, answer: str) -> None:
    """Run one family in this process and write its row to a file."""
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    Path(answer).write_text(json.dumps(asdict(try_family(family))))


def in_process(family: str, seconds: int, memory: int) -> Row:
    """Run one family apart from this process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["timm", "torch", "bonn_plugin", "bonn_plugin.checkpoint"])
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "row.json"
        process = context.Process(target=child, args=(family, memory, str(answer)))
        process.start()
        process.join(seconds)
        if process.is_alive():
            process.kill()
            process.join()
            return Row(family, FAILED, f"not done after {seconds} s")
        if not answer.exists():
            return Row(family, FAILED, f"the process ended with {process.exitcode}")
        return Row(**json.loads(answer.read_text()))


def page(rows: list[Row]) -> str:
    """Return docs/timm_support.md."""
    count = Counter(row.result for row in rows)
    passed, tried, none = count[PASSED], count[PASSED] + count[FAILED], count[NOT_APPLICABLE]
    lines = [
        "# Families of timm",
        "",
        *textwrap.wrap(ABOUT, 119, break_on_hyphens=False),
        "",
        f"**{passed} passed of {tried} tried; {none} of {len(rows)} families are not applicable.**",
        "",
        f"timm {timm.__version__}, torch {torch.__version__.partition('+')[0]}, {platform.machine()}, 1 thread, "
        f"{datetime.now(UTC):%Y-%m-%d}. The rate is float32 bits over",
        f"stored bits, by parameters, with {CLASSES} classes.",
        "",
        "| family | network | pixels | binarised | left alone | rate | result |",
        "| --- | --- | --: | --: | --- | --: | --- |",
    ]
    for row in rows:
        left = "; ".join(f"{reason}: {n}" for reason, n in sorted(row.left.items(), key=lambda pair: -pair[1]))
        result = row.result if row.result == PASSED else f"{row.result}: {row.reason}"
        size, rate = row.size or "", f"{row.rate:.2f}" if row.rate else ""
        lines.append(f"| {row.family} | {row.model} | {size} | {row.binarised} | {left} | {rate} | {result} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="FAMILY", help="these families; print them, write no page")
    parser.add_argument("--again", action="store_true", help="forget what is done already")
    parser.add_argument("--retry", action="store_true", help="run again what failed")
    parser.add_argument("--seconds", type=int, default=420, help="limit of a family")
    parser.add_argument("--memory", type=int, default=12, metavar="GIB", help="address space of a family")
    args = parser.parse_args()
    if args.again:
        STATE.unlink(missing_ok=True)
    done: dict[str, Row] = {}
    if STATE.exists() and not args.only:  # a family's last line counts
        done = {row.family: row for row in (Row(**json.loads(line)) for line in STATE.read_text().splitlines())}
    wanted = args.only or families()
    for i, family in enumerate(wanted):
        if family in done and not (args.retry and done[family].result == FAILED):
            continue
        row = done[family] = in_process(family, args.seconds, args.memory * GIB)
        if not args.only:
            STATE.parent.mkdir(exist_ok=True)
            with STATE.open("a") as file:
                file.write(json.dumps(asdict(row)) + "\n")
        print(
            f"{i + 1}/{len(wanted)} {family}: {row.model} {row.result} {row.reason} "
            f"({row.binarised} binarised, rate {row.rate}, {row.size} px, {row.seconds} s; left alone: {row.left})",
            flush=True,
        )
    rows = [done[family] for family in wanted]
    if not args.only:
        PAGE.write_text(page(rows))
        print(f"{PAGE.relative_to(ROOT)} written")
    sys.exit(any(row.result == FAILED for row in rows))


if __name__ == "__main__":
    main()
