"""What benchmarks/tables.py trains: the rows of each table and the settings of each data set."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

Width = Literal["narrow", "wide"]
Amp = Literal["auto", "bfloat16"]


@dataclass(frozen=True)
class Setting:
    """What all rows of one data set have in common.

    ``networks`` are by width, the inside of a mapping; ``feature_start`` is the first epoch of the feature loss,
    ``merge_end`` the last of merging; ``lr_bonn`` are the learning rates of w and of sigma; ``longer`` says that rows
    which train a multiple of ``epochs`` do so here, and that the tables which consist of them are of use.
    """

    data: str
    networks: dict[Width, str]
    epochs: int
    batch_size: int
    lr: float
    warmup: int
    feature_start: int
    merge_end: int
    what: str
    lr_bonn: tuple[float, float] = (2e-4, 2e-3)
    longer: bool = False


RESNET = "name: bonn_resnet18, num_classes: 10, args: {{widths: {widths}, shortcut: {shortcut}}}"
WRN = "name: {name}, num_classes: {classes}, args: {{{{shortcut: {{shortcut}}}}}}"
SETTINGS = {
    "digits_clutter": Setting(
        data="name: digits_clutter",
        networks={
            "narrow": RESNET.replace("{widths}", "[16, 32, 64, 128]"),
            "wide": RESNET.replace("{widths}", "[64, 128, 256, 512]"),
        },
        epochs=12,
        batch_size=64,
        lr=2e-2,
        warmup=1,
        feature_start=8,
        merge_end=6,
        longer=True,
        what="ResNet18 of a quarter of the width (16-32-64-128) and of the whole (64-128-256-512), 32 px",
    ),
    **{
        name: Setting(
            data=f"name: {name}, root: ROOT",
            networks={
                "narrow": WRN.format(name="bonn_wrn22_16", classes=classes),
                "wide": WRN.format(name="bonn_wrn22_64", classes=classes),
            },
            epochs=200,
            batch_size=128,
            lr=3e-3,
            warmup=5,
            feature_start=160,
            merge_end=60,
            lr_bonn=(3e-5, 3e-4),
            what="WRN22 16-16-32-64 and 64-64-128-256",
        )
        for name, classes in (("cifar10", 10), ("cifar100", 100))
    },
}

LAMBDA, NU, THETA = "1e-4", "1e-3", "1e-3"
"""The paper's lambda and theta (section 3.2) and its nu for ResNet18 (section 3.1.3)."""


@dataclass(frozen=True)
class Row:
    """One training: ``binarize`` are its settings, None for full precision; ``more`` are modifiers after it.

    ``times`` is the multiple of the setting's epochs that it trains, and ``amp`` the recipe's, where the setting is
    one for longer training.
    """

    name: str
    binarize: str | None = "method: bonn"
    more: tuple[str, ...] = ()
    shortcut: str = "block"
    norm: str = "after"
    width: Width = "narrow"
    weight_decay: float = 0.0
    times: int = 1
    amp: Amp = "auto"


@dataclass(frozen=True)
class Table:
    """A table: its rows, and pairs (better, worse) of row names that are compared over the seeds."""

    title: str
    words: str
    rows: tuple[Row, ...]
    pairs: tuple[tuple[str, str], ...] = ()
    paper: dict[str, str] = field(default_factory=dict)


def kernel(lam: str = LAMBDA, nu: str = NU) -> str:
    return f"{{type: kernel_loss, lambda: {lam}, nu: {nu}}}"


def feature(theta: str = THETA) -> str:
    return f"{{type: feature_loss, theta: {theta}, start: FEATURE_START}}"


FULL = Row("full precision", None)
NONE = Row("BONN, no Bayesian loss")
KERNEL = Row("BONN, kernel loss", more=(kernel(),))
FEATURE = Row("BONN, feature loss", more=(feature(),))
BOTH = Row("BONN", more=(kernel(), feature()))
BIREAL = Row("Bi-Real Net's quantiser", "method: bireal")
XNOR = Row("XNOR-Net", "method: xnor")
XNOR_PLAIN = Row("XNOR-Net without K", "method: xnor, input_scale: false")
BNN = Row("BNN", "method: bnn")
BIREAL_OWN = Row("Bi-Real Net, a shortcut a convolution", "method: bireal", shortcut="conv")
REACT_OWN = Row("ReActNet, a shortcut a convolution", "method: reactnet", shortcut="conv")
BONN_OWN = Row("BONN, a shortcut a convolution", more=(kernel(), feature()), shortcut="conv")
NONE_OWN = Row("BONN, no Bayesian loss, a shortcut a convolution", shortcut="conv")
XNOR_OWN = Row("XNOR-Net, norms before the sign", "method: xnor", norm="before")
ONE_MODE = Row("one mode at zero", more=("{type: one_mode, lambda: LAMBDA, nu: NU}",))
DECAY = Row("weight decay 1e-5", weight_decay=1e-5)
WIDE_FULL = Row("full precision, wide", None, width="wide")
WIDE_XNOR = Row("XNOR-Net, wide", "method: xnor", width="wide")
WIDE_BONN = Row("BONN, wide", more=(kernel(), feature()), width="wide")
WIDE_NONE = Row("BONN, no Bayesian loss, wide", width="wide")
WIDE_BONN_LOW = Row("BONN with lambda 1e-5, wide", more=(kernel("1e-5"), feature()), width="wide")


LONG: dict[int, tuple[str, Amp]] = {3: ("long", "auto"), 5: ("longer", "auto"), 10: ("longest", "bfloat16")}
"""Name and precision of rows that train a multiple of their setting's epochs; bfloat16 saves a fifth of the time."""


def long(row: Row, times: int = 3) -> Row:
    """Return the row over a multiple of its epochs."""
    word, amp = LONG[times]
    return replace(row, name=f"{row.name}, {word}", times=times, amp=amp)


def long_pairs(*pairs: tuple[Row, Row], times: int = 3) -> tuple[tuple[str, str], ...]:
    return tuple((long(better, times).name, long(worse, times).name) for better, worse in pairs)


TABLES = {
    "table2": Table(
        "Table 2: the Bayesian losses",
        "The paper's Table 2 (ResNet18, ImageNet) without and with each loss.",
        (NONE, KERNEL, FEATURE, BOTH),
        (
            (KERNEL.name, NONE.name),
            (FEATURE.name, NONE.name),
            (BOTH.name, NONE.name),
            (BOTH.name, KERNEL.name),
            (BOTH.name, FEATURE.name),
        ),
        {NONE.name: "56.3", KERNEL.name: "58.3", FEATURE.name: "58.4", BOTH.name: "59.3"},
    ),
    "table3": Table(
        "Table 3: full precision, XNOR-Net and BONN at two widths",
        "The paper's Table 3 (WRN22, CIFAR-10).",
        (FULL, XNOR, BOTH, WIDE_FULL, WIDE_XNOR, WIDE_BONN),
        (
            (BOTH.name, XNOR.name),
            (WIDE_BONN.name, WIDE_XNOR.name),
            (FULL.name, BOTH.name),
            (WIDE_FULL.name, WIDE_BONN.name),
        ),
        {
            FULL.name: "91.66",
            XNOR.name: "81.90",
            BOTH.name: "87.34",
            WIDE_FULL.name: "94.96",
            WIDE_XNOR.name: "88.52",
            WIDE_BONN.name: "92.36",
        },
    ),
    "table4": Table(
        "Table 4: the methods",
        "The methods of the paper's Table 4 (ResNet18, ImageNet), all in one network: a norm after each "
        "convolution, a shortcut round each two.",
        (
            FULL,
            Row("BWN (real activations)", "method: bwn"),
            Row("DoReFa-Net (4-bit activations)", "method: dorefa, activation_bits: 4"),
            Row("TBN (ternary activations)", "method: tbn"),
            BNN,
            XNOR,
            XNOR_PLAIN,
            Row("ABC-Net (1 base, 1 base)", "method: abc"),
            BIREAL,
            Row("PCNN", "method: pcnn", ("{type: projection_loss, lambda: 1e-4}",)),
            BOTH,
            Row("ReActNet's quantiser and activation", "method: reactnet"),
        ),
        (
            (BOTH.name, XNOR.name),
            (BOTH.name, XNOR_PLAIN.name),
            (BOTH.name, BIREAL.name),
            (BIREAL.name, BNN.name),
            (BOTH.name, BNN.name),
            (BOTH.name, "PCNN"),
            (FULL.name, BOTH.name),
        ),
        {
            FULL.name: "69.3",
            "BWN (real activations)": "60.8",
            "DoReFa-Net (4-bit activations)": "59.2",
            "TBN (ternary activations)": "55.6",
            BNN.name: "42.2",
            XNOR.name: "51.2",
            "ABC-Net (1 base, 1 base)": "42.7",
            BIREAL.name: "56.4",
            "PCNN": "57.3",
            BOTH.name: "59.3",
        },
    ),
    "wide": Table(
        "The losses at width 64",
        "The wide network of Table 3 without the losses and with a tenth of lambda.",
        (WIDE_FULL, WIDE_XNOR, WIDE_NONE, WIDE_BONN, WIDE_BONN_LOW),
        (
            (WIDE_BONN.name, WIDE_NONE.name),
            (WIDE_BONN_LOW.name, WIDE_NONE.name),
            (WIDE_BONN_LOW.name, WIDE_XNOR.name),
            (WIDE_NONE.name, WIDE_XNOR.name),
            (WIDE_FULL.name, WIDE_BONN_LOW.name),
        ),
    ),
    "long": Table(
        "The orderings after longer training",
        "EPOCHS epochs, the feature loss from epoch FEATURE_START on, all else as above.",
        tuple(long(row) for row in (FULL, NONE, KERNEL, FEATURE, BOTH, BNN, XNOR, BIREAL)),
        long_pairs(
            (KERNEL, NONE),
            (FEATURE, NONE),
            (BOTH, NONE),
            (BOTH, KERNEL),
            (BOTH, FEATURE),
            (BOTH, XNOR),
            (BOTH, BIREAL),
            (BIREAL, BNN),
            (BOTH, BNN),
            (FEATURE, XNOR),
            (BNN, XNOR),
            (FULL, BOTH),
        ),
    ),
    "long_wide": Table(
        "Width 64 after longer training",
        "The wide network over EPOCHS epochs.",
        (long(WIDE_FULL), long(WIDE_BONN)),
        long_pairs((WIDE_FULL, WIDE_BONN)),
    ),
    "longer_wide": Table(
        "Width 64 after still longer training",
        "The wide network over EPOCHS epochs, the feature loss from epoch FEATURE_START on.",
        (long(WIDE_FULL, 5), long(WIDE_BONN, 5), long(WIDE_BONN_LOW, 5)),
        long_pairs((WIDE_FULL, WIDE_BONN), (WIDE_FULL, WIDE_BONN_LOW), times=5),
    ),
    "longest_wide": Table(
        "Width 64 after the longest training",
        "The wide network over EPOCHS epochs in bfloat16 (autocast), the feature loss from epoch FEATURE_START on.",
        (long(WIDE_FULL, 10), long(WIDE_BONN_LOW, 10)),
        long_pairs((WIDE_FULL, WIDE_BONN_LOW), times=10),
    ),
    "long_modes": Table(
        "The controls after longer training",
        "The same controls over EPOCHS epochs.",
        tuple(long(row) for row in (NONE, KERNEL, ONE_MODE, DECAY)),
        long_pairs((KERNEL, ONE_MODE), (KERNEL, DECAY), (ONE_MODE, NONE), (DECAY, NONE)),
    ),
    "structure": Table(
        "The structure of the network",
        "The same methods in the structure that they were published with, but for PReLU: a shortcut round each "
        "convolution (Bi-Real Net, ReActNet), and norms before the sign (XNOR-Net).",
        (BOTH, BONN_OWN, BIREAL, BIREAL_OWN, REACT_OWN, XNOR, XNOR_OWN),
        (
            (BONN_OWN.name, BIREAL_OWN.name),
            (BOTH.name, BONN_OWN.name),
            (BIREAL.name, BIREAL_OWN.name),
            (XNOR.name, XNOR_OWN.name),
        ),
    ),
    "long_structure": Table(
        "The structure after longer training",
        "The same structures over EPOCHS epochs.",
        tuple(long(row) for row in (BNN, BIREAL, BIREAL_OWN, REACT_OWN, NONE, NONE_OWN, BOTH, BONN_OWN)),
        long_pairs(
            (BIREAL_OWN, BNN),
            (BONN_OWN, BIREAL_OWN),
            (NONE_OWN, BIREAL_OWN),
            (BONN_OWN, NONE_OWN),
            (BIREAL, BIREAL_OWN),
            (NONE, NONE_OWN),
            (BOTH, BONN_OWN),
            (REACT_OWN, BIREAL_OWN),
        ),
    ),
    "lambda": Table(
        "Ablation: lambda",
        "Kernel loss alone, nu as above.",
        (NONE, *(Row(f"lambda {lam}", more=(kernel(lam),)) for lam in ("1e-5", "1e-3", "1e-2")), KERNEL),
        tuple((f"lambda {lam}", NONE.name) for lam in ("1e-5", "1e-3", "1e-2")),
    ),
    "theta": Table(
        "Ablation: theta",
        "Feature loss alone, in the last third.",
        (NONE, *(Row(f"theta {theta}", more=(feature(theta),)) for theta in ("1e-4", "1e-2")), FEATURE),
        tuple((f"theta {theta}", NONE.name) for theta in ("1e-4", "1e-2")),
    ),
    "modes": Table(
        "Do two modes help, or would weight decay do?",
        "Controls of the kernel loss: weight decay (of the latent kernels, stem, 1x1 convolutions and classifier), and "
        "the same loss with both modes at zero, which is a weight decay of the kernels of learned strength.",
        (
            NONE,
            KERNEL,
            ONE_MODE,
            DECAY,
            Row("weight decay 1e-3", weight_decay=1e-3),
        ),
        (
            (KERNEL.name, ONE_MODE.name),
            (KERNEL.name, DECAY.name),
            (KERNEL.name, "weight decay 1e-3"),
            (ONE_MODE.name, NONE.name),
        ),
    ),
    "merging": Table(
        "Merging filters",
        "Bayesian pruning on top of both losses: the share of filters that is kept.",
        (
            BOTH,
            *(
                Row(
                    f"keep {keep}",
                    more=(kernel(), feature(), f"{{type: filter_merge, keep: {keep}, start: 1, end: MERGE_END}}"),
                )
                for keep in ("0.75", "0.5")
            ),
        ),
        ((BOTH.name, "keep 0.75"), (BOTH.name, "keep 0.5")),
    ),
}


def times_of(row: Row, dataset: str) -> int:
    """Return the multiple of the data set's epochs that a row trains there."""
    return row.times if SETTINGS[dataset].longer else 1


def recipe_text(row: Row, dataset: str, root: str) -> str:
    """Return the recipe of a row, without its seed."""
    s = SETTINGS[dataset]
    after = row.norm == "after" and "resnet" in s.networks[row.width]  # a pre-activation WRN has its norms before
    shortcut = f"{row.shortcut}, norm: after" if after else row.shortcut
    rates = []
    bonn = row.binarize is not None and "method: bonn" in row.binarize
    if bonn or "method: pcnn" in (row.binarize or ""):
        rates.append(f"modulation: {s.lr_bonn[0]:g}")
    if bonn and any("kernel_loss" in m or "one_mode" in m for m in row.more):
        rates.append(f"sigma: {s.lr_bonn[1]:g}")
    modifiers = [] if row.binarize is None else [f"{{type: binarize, {_threshold(row.binarize)}}}", *row.more]
    listed = ", ".join(modifiers)
    times = times_of(row, dataset)
    amp = f"\n  amp: {row.amp}" if row.amp != "auto" and s.longer else ""
    for word, value in (
        ("FEATURE_START", str(times * s.feature_start)),
        ("MERGE_END", str(times * s.merge_end)),
        ("LAMBDA", LAMBDA),
        ("NU", NU),
    ):
        listed = listed.replace(word, value)
    return f"""version: 1
name: tables
model: {{task: classification, {s.networks[row.width].format(shortcut=shortcut)}}}
data: {{{s.data.replace("ROOT", root)}}}
training:
  epochs: {times * s.epochs}
  batch_size: {s.batch_size}
  optimizer: {{name: adam, lr: {s.lr:g}, weight_decay: {row.weight_decay:g}, lr_by_role: {{{", ".join(rates)}}}}}
  schedule: {{name: cosine, warmup_epochs: {s.warmup}}}{amp}
modifiers: [{listed}]
"""


def _threshold(binarize: str) -> str:
    """No learned thresholds where the method has none of its own: the networks feed both signs."""
    own = any(name in binarize for name in ("bwn", "dorefa", "tbn", "abc", "reactnet"))
    return binarize if own else f"{binarize}, threshold: never"
