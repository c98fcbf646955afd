"""Broken recipes and broken checkpoints by chance, for the tests and for the long run of benchmarks/fuzz.py."""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bonn_plugin import load_packed, parse_recipe, verify_packed
from bonn_plugin.checkpoint import CONFIG, WEIGHTS, _digest
from bonn_plugin.errors import CheckpointError
from bonn_plugin.files import sha256
from bonn_plugin.recipe import Recipe, RecipeError

KEYS = [
    *("version", "name", "model", "data", "training", "modifiers", "task", "num_classes", "args", "init_from", "root"),
    *("size", "pad", "workers", "epochs", "batch_size", "optimizer", "lr", "momentum", "weight_decay", "lr_by_role"),
    *("schedule", "milestones", "gamma", "every", "warmup_epochs", "amp", "ema", "accumulate", "clip_grad", "seed"),
    *("type", "targets", "expect", "lambda", "nu", "start", "end", "theta", "keep", "others", "sensitivity", "crop"),
]
HUGE = [
    "9" * 5000,
    "1e999999999",
    "-1e308",
    "1" + "0" * 4000 + ".0",
    "0x" + "f" * 3000,
    "1_000",
    "1" * 300 + "e-5",
    ".inf",
]
ODD = [
    *("null", "~", "yes", "no", "true", "[]", "{}", "''", '"\\u0000"', "\x00", "\ufeff", "- -", "? a", "&a *a", "*b"),
    *(
        "!!python/object:os.system x",
        "!!binary aGk=",
        "<<: *a",
        "2026-11-21",
        "0o17",
        "1:30:00",
        "NaN",
        "-0.0",
        "|\n  x",
    ),
    *(
        "'re:('",
        "'re:(a+)+$'",
        "'re:" + "(" * 200 + "'",
        "class:",
        "\U0001f600",
        "\ud7ff",
        "%TAG ! x",
        "---",
        "...",
        "\t",
    ),
]


def bomb(rng: random.Random) -> str:
    """Return a document that grows without bound for a loader that follows aliases."""
    levels, width = rng.randint(2, 40), rng.randint(2, 10)
    lines = ["a0: &a0 [x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * width)}]" for i in range(1, levels)]
    return "\n".join(lines)


def nested(rng: random.Random) -> str:
    """Return a document that is nested deeply."""
    depth = rng.choice([10, 100, 1_000, 20_000])
    opening, closing = rng.choice([("[", "]"), ("{a: ", "}"), ("- ", ""), ("? ", "")])
    return opening * depth + "x" + closing * depth


def value(rng: random.Random) -> str:
    kinds: list[Callable[[], str]] = [
        lambda: rng.choice(HUGE),
        lambda: rng.choice(ODD),
        lambda: nested(rng),
        lambda: rng.choice("xyz") * rng.choice([1, 100, 100_000]),
        lambda: str(rng.randint(-(10**18), 10**18)),
        lambda: repr(rng.uniform(-1e9, 1e9)),
        lambda: f"[{', '.join(rng.choice(ODD + HUGE) for _ in range(rng.randint(0, 4)))}]",
        lambda: f"{{{rng.choice(KEYS)}: {rng.choice(ODD + HUGE)}}}",
    ]
    return rng.choice(kinds)()


def broken_recipe(rng: random.Random, whole: list[str]) -> str:
    """Return a recipe with one to five mistakes, or something that never was one."""
    shape = rng.random()
    if shape < 0.03:
        return bomb(rng)
    if shape < 0.06:
        return nested(rng)
    if shape < 0.1:
        return "".join(
            chr(rng.choice([rng.randint(0, 127), rng.randint(128, 0x2FFF)])) for _ in range(rng.randint(0, 300))
        )
    text = rng.choice(whole)
    for _ in range(rng.randint(1, 5)):
        lines = text.split("\n")
        i = rng.randrange(len(lines))
        at, to = sorted((rng.randint(0, len(text)), rng.randint(0, len(text))))
        kind = rng.randrange(9)
        if kind == 0:
            text = text[:at] + text[min(to, at + 30) :]
        elif kind == 1:
            text = text[:at] + rng.choice(ODD + HUGE + KEYS) + text[at:]
        elif kind == 2:
            text = text[:at] + text[at : at + 40] * rng.randint(2, 50) + text[at + 40 :]
        elif kind == 3:
            lines[i] = " " * rng.randint(0, 9) + lines[i].strip()
            text = "\n".join(lines)
        elif kind == 4:
            lines.insert(i, rng.choice(lines))
            text = "\n".join(lines)
        elif kind == 5:
            key, colon, _ = lines[i].partition(":")
            lines[i] = key + colon + " " + value(rng)
            text = "\n".join(lines)
        elif kind == 6:
            text = text.replace(rng.choice(KEYS), rng.choice(KEYS), 1)
        elif kind == 7:
            lines.insert(i, f"{' ' * rng.choice([0, 2, 4])}{rng.choice(KEYS)}: {value(rng)}")
            text = "\n".join(lines)
        else:
            text = text[:at] + text[to:]
    return text


def parsed(text: str) -> Recipe | RecipeError:
    """Return what the loader makes of a text; any other exception is a crash."""
    try:
        return parse_recipe(text, "fuzz.yaml")
    except RecipeError as error:
        return error


# --- checkpoints ---------------------------------------------------------------------------------


def damage(rng: random.Random, content: bytes) -> bytes:
    """Return bytes with flipped bits, a truncation, a hole, a repeat or something appended."""
    kind, at = rng.randrange(6), rng.randrange(max(1, len(content)))
    if kind == 0:
        return content[:at]
    if kind == 1:
        return content + rng.randbytes(rng.randint(1, 100))
    if kind == 2:
        return content[:at] + bytes(min(64, len(content) - at)) + content[at + 64 :]
    if kind == 3:
        return content[:at] + content[at + rng.randint(1, 64) :]
    changed = bytearray(content)
    for _ in range(1 if kind == 4 else rng.randint(2, 8)):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def lie(rng: random.Random, content: bytes) -> bytes:
    """Return a safetensors file whose header says something else than it did."""
    (size,) = struct.unpack("<Q", content[:8])
    header: dict[str, Any] = json.loads(content[8 : 8 + size])
    name = rng.choice([key for key in header if key != "__metadata__"])
    entry, other = header[name], header[rng.choice([key for key in header if key != "__metadata__"])]
    kind = rng.randrange(10)
    if kind == 0:
        entry["shape"] = [rng.choice([-1, 0, 1, 2**31, 2**63, 2**64, 10**30]) for _ in range(rng.randint(0, 5))]
    elif kind == 1:
        entry["dtype"] = rng.choice(["F64", "F16", "BF16", "U8", "I64", "BOOL", "F8_E5M2", "X", "", 7])
    elif kind == 2:
        entry["data_offsets"] = [rng.choice([-1, 0, 5, 2**40, 2**63]), rng.choice([0, 5, 2**40, 2**64 - 1])]
    elif kind == 3:
        entry["data_offsets"], other["data_offsets"] = other["data_offsets"], entry["data_offsets"]
    elif kind == 4:
        header[name + ".more"] = dict(entry)
    elif kind == 5:
        del header[name]
    elif kind == 6:
        entry["shape"] = [*entry["shape"][::-1], 1]
    elif kind == 7:
        entry["data_offsets"] = list(other["data_offsets"])
    elif kind == 8:
        header["__metadata__"] = {"x": "y" * rng.choice([1, 10**6])}
    lied = json.dumps(header).encode()
    said = len(lied) if kind != 9 else rng.choice([0, 1, len(lied) + 8, 2**31, 2**63, 2**64 - 1])
    return struct.pack("<Q", said) + lied + content[8 + size :]


def agree(folder: Path) -> None:
    """Make the checksums of a folder right for what its files hold now."""
    config = json.loads((folder / CONFIG).read_bytes())
    config["sha256"][WEIGHTS] = sha256((folder / WEIGHTS).read_bytes())
    config["self"] = _digest({key: item for key, item in config.items() if key != "self"})
    (folder / CONFIG).write_text(json.dumps(config))


class BrokenCheckpoints:
    """Damages copies of a checkpoint folder.

    Args:
        whole: the folder.
        place: where to put the copy.
    """

    def __init__(self, whole: Path, place: Path) -> None:
        self.whole = whole
        self.copy = place / "copy"
        self.files = [CONFIG, WEIGHTS]
        self.images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        self.logits = self._logits(whole)

    def attempt(self, rng: random.Random) -> str:
        """Damage a copy and load it; return ``"refused"`` or ``"the same"``, or what went wrong."""
        shutil.rmtree(self.copy, ignore_errors=True)
        self.copy.mkdir()
        for file in self.files:
            shutil.copy(self.whole / file, self.copy / file)
        lied = rng.random() < 0.4
        name = WEIGHTS if lied else rng.choice(self.files)
        change = lie if lied else damage
        (self.copy / name).write_bytes(change(rng, (self.whole / name).read_bytes()))
        if lied:
            agree(self.copy)  # the checksums are right: it is the header that must be refused
        try:
            logits = self._logits(self.copy)
            if lied and not torch.equal(logits, self.logits):
                # tensors exchanged by someone who also made the checksums right: what verify is for
                verify_packed(self.copy)
        except CheckpointError:
            return "refused"
        return "the same" if torch.equal(logits, self.logits) else "wrong logits"

    @torch.no_grad()
    def _logits(self, folder: Path) -> torch.Tensor:
        logits: torch.Tensor = load_packed(folder)(self.images)
        return logits
