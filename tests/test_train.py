"""The runner and the command, end to end on small runs."""

import json
import re
import subprocess
import sys

import pytest
import torch

from bonn_plugin import cli, load_packed, parse_recipe
from bonn_plugin.checkpoint import load_state
from bonn_plugin.data import load_splits
from bonn_plugin.nn.distribution import valley
from bonn_plugin.optim import make_optimizer, make_scheduler
from bonn_plugin.recipe import DigitsConfig
from bonn_plugin.report import Report
from bonn_plugin.shipped import shipped_recipes
from bonn_plugin.train import STATE, Runner
from tests.conftest import TINY


class Lines:
    def __init__(self):
        self.texts = []

    def line(self, text):
        self.texts.append(text)

    def steps(self, batches, epoch, epochs, total):
        return batches


def bonn(*args, monkeypatch=None):
    """Run the command in this process."""
    monkeypatch.setattr(sys, "argv", ["bonn", *map(str, args)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "tiny"
    recipe = parse_recipe(TINY + "  - {type: feature_loss, theta: 1e-2, start: 1}\n", "tiny.yaml")
    runner = Runner(recipe, folder, torch.device("cpu"), Lines())
    runner.train(resume=False)
    runner.finish()
    return folder


def test_a_run_leaves_a_whole_folder(run_folder):
    assert sorted(p.name for p in run_folder.iterdir()) == [
        "config.json",
        "model.safetensors",
        "recipe.yaml",
        "report.json",
        "report.md",
        "summary.csv",
        "training",
    ]
    records = [json.loads(line) for line in (run_folder / "training" / "metrics.jsonl").read_text().splitlines()]
    assert [r["epoch"] for r in records] == [1, 2, 3]
    assert set(records[0]["loss"]) == {"task", "kernel"}
    assert set(records[2]["loss"]) == {"task", "kernel", "feature"}
    assert records[-1]["test_top1"] > 20


def test_the_loss_on_the_test_set_is_the_mean_cross_entropy(run_folder):
    recipe = parse_recipe((run_folder / "recipe.yaml").read_text())
    model, test = load_packed(run_folder), load_splits(recipe.data, 10).test
    total = 0.0
    with torch.no_grad():
        for image, label in test:
            total -= float(model(image[None]).double().log_softmax(1)[0, label])
    record = json.loads((run_folder / "training" / "metrics.jsonl").read_text().splitlines()[-1])
    assert record["test_loss"] == pytest.approx(total / len(test), rel=1e-6)


def test_the_report_tells_what_is_measured(run_folder):
    report = Report.model_validate_json((run_folder / "report.json").read_bytes())
    assert report.accuracy.identical_logits
    assert report.accuracy.trained_top1 == report.accuracy.packed_top1
    assert report.files.weights == (run_folder / "model.safetensors").stat().st_size
    files = ("model.safetensors", "config.json", "recipe.yaml")
    assert report.files.folder == sum((run_folder / f).stat().st_size for f in files)
    assert sum(row.needed_bits for row in report.roles) == sum(row.needed_bits for row in report.tensors)
    assert sum(row.needed_bits for row in report.layers) == sum(row.needed_bits for row in report.tensors)
    markdown = (run_folder / "report.md").read_text()
    for rate in report.rates:
        assert f"| {rate.rule} |" in markdown
        assert f"| {rate.rate:.2f} |" in markdown


def test_evaluate_verify_and_report_agree_with_the_run(run_folder, monkeypatch, capsys):
    report = Report.model_validate_json((run_folder / "report.json").read_bytes())
    assert bonn("evaluate", run_folder, monkeypatch=monkeypatch) == 0
    assert f"top-1 {report.accuracy.packed_top1:.2f} %" in capsys.readouterr().out
    assert bonn("verify", run_folder, monkeypatch=monkeypatch) == 0
    assert "logits equal bit for bit" in capsys.readouterr().out
    assert bonn("report", run_folder, "--format", "json", monkeypatch=monkeypatch) == 0
    assert Report.model_validate_json(capsys.readouterr().out) == report
    assert bonn("report", run_folder, "--format", "markdown", monkeypatch=monkeypatch) == 0
    assert capsys.readouterr().out == (run_folder / "report.md").read_text()
    assert bonn("report", run_folder, monkeypatch=monkeypatch) == 0
    assert "layer1.0.conv1" in capsys.readouterr().out


def test_check_shows_layers_windows_and_rates_without_training(monkeypatch, capsys):
    assert bonn("check", "digits_wrn22_16", monkeypatch=monkeypatch) == 0
    out = capsys.readouterr().out
    assert "layer3.2.conv2" in out
    assert "both signs" in out
    assert re.search(r"kernel_loss.*20 to 40.*\.{20}#{20}", out)
    assert "compression rate by parameters: 20.37" in out


def test_check_says_where_a_relu_leaves_one_sign(monkeypatch, capsys, tmp_path):
    text = TINY.replace(
        "{name: bonn_wrn22_16, num_classes: 10, args: {depth: 10, widths: [8, 8, 16]}}",
        "{name: resnet10t, num_classes: 10}",
    )
    (tmp_path / "r.yaml").write_text(text.replace("size: 8", "size: 32"))
    assert bonn("check", tmp_path / "r.yaml", monkeypatch=monkeypatch) == 0
    assert "learned threshold per channel" in capsys.readouterr().out
    never = ["--set", "modifiers.binarize.threshold=never"]
    assert bonn("check", tmp_path / "r.yaml", *never, monkeypatch=monkeypatch) == 0
    assert "WARNING: one sign only" in capsys.readouterr().out


def test_every_shipped_recipe_is_listed_with_its_line(monkeypatch, capsys):
    assert bonn("recipes", monkeypatch=monkeypatch) == 0
    out = capsys.readouterr().out
    names = shipped_recipes()
    assert {"digits_wrn22_16", "cifar10_wrn22_16", "cifar10_wrn22_64", "cifar100_wrn22_16", "imagenet_resnet18"} <= set(
        names
    )
    assert all(name in out for name in names)
    assert bonn("recipes", "digits_wrn22_16", monkeypatch=monkeypatch) == 0
    assert capsys.readouterr().out == names["digits_wrn22_16"].read_text()


def test_a_resumed_run_ends_with_the_same_weights_bit_for_bit(run_folder, tmp_path):
    recipe = parse_recipe((run_folder / "recipe.yaml").read_text())
    first = Runner(recipe, tmp_path, torch.device("cpu"), Lines())
    epoch = first._epoch
    first._epoch = lambda e, *more: epoch(e, *more) if e < 2 else (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        first.train(resume=False)
    second = Runner(recipe, tmp_path, torch.device("cpu"), Lines())
    second.train(resume=True)
    second.finish()
    whole, resumed = (load_state(f / STATE) for f in (run_folder, tmp_path))
    assert whole["model"].keys() == resumed["model"].keys()
    for name, tensor in whole["model"].items():
        assert torch.equal(tensor, resumed["model"][name]), name
    for name in ("model.safetensors", "config.json"):
        assert (run_folder / name).read_bytes() == (tmp_path / name).read_bytes()


def test_two_step_training_starts_from_full_precision_and_from_one_bit(run_folder, tmp_path):
    full = parse_recipe(TINY.split("modifiers:")[0])
    runner = Runner(full, tmp_path / "full", torch.device("cpu"), Lines())
    runner.train(resume=False)
    assert load_packed(runner.finish().folder)(torch.zeros(1, 3, 8, 8)).shape == (1, 10)
    for start in (tmp_path / "full", run_folder):
        recipe = parse_recipe(TINY.replace("name: bonn_wrn22_16,", f"name: bonn_wrn22_16, init_from: '{start}',"))
        second = Runner(recipe, tmp_path / "second", torch.device("cpu"), Lines())
        given = load_state(start / STATE)["model"]
        for name, tensor in second.model.state_dict().items():
            if name in given:
                assert torch.equal(tensor, given[name]), name
        if start != run_folder:  # what binarisation adds is estimated from the given weights
            layer = second.model.layer1[0].conv1
            assert float(layer.modulation.detach().mean()) == pytest.approx(float(layer.weight.detach().abs().mean()))


def test_a_packed_checkpoint_alone_can_be_started_from(run_folder, tmp_path):
    for name in ("model.safetensors", "config.json", "recipe.yaml"):
        (tmp_path / name).write_bytes((run_folder / name).read_bytes())
    recipe = parse_recipe(TINY.replace("name: bonn_wrn22_16,", f"name: bonn_wrn22_16, init_from: '{tmp_path}',"))
    runner = Runner(recipe, tmp_path / "out", torch.device("cpu"), Lines())
    before = runner.task.measure(runner.model, torch.device("cpu"))["test_top1"]
    report = Report.model_validate_json((run_folder / "report.json").read_bytes())
    assert before == pytest.approx(report.accuracy.packed_top1)


def test_another_number_of_classes_starts_the_classifier_anew_and_says_so(run_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(DigitsConfig, "classes", property(lambda self: None))
    splits = load_splits(parse_recipe(TINY).data, 10)
    monkeypatch.setattr("bonn_plugin.train.classification.load_splits", lambda config, classes: splits)
    text = TINY.replace("num_classes: 10,", f"num_classes: 12, init_from: '{run_folder}',")
    lines = Lines()
    Runner(parse_recipe(text), tmp_path, torch.device("cpu"), lines)
    assert [t for t in lines.texts if "fc.weight starts anew" in t]


@pytest.mark.parametrize(
    ("schedule", "wanted"),
    [
        ("{name: constant}", [1, 1, 1, 1, 1, 1]),
        ("{name: multistep, milestones: [2, 4], gamma: 0.1}", [1, 1, 0.1, 0.1, 0.01, 0.01]),
        ("{name: step, every: 3, gamma: 0.5}", [1, 1, 1, 0.5, 0.5, 0.5]),
        ("{name: cosine}", [1.0, 0.933, 0.75, 0.5, 0.25, 0.067]),
        ("{name: linear}", [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        ("{name: linear, final_lr: 0.4}", [1, 0.9, 0.8, 0.7, 0.6, 0.5]),
        ("{name: linear, warmup_epochs: 2}", [0.01, 0.505, 1, 0.75, 0.5, 0.25]),
        ("{name: cosine, final_lr: 0.5}", [1.0, 0.967, 0.875, 0.75, 0.625, 0.533]),
        ("{name: multistep, milestones: [3], gamma: 0.1, warmup_epochs: 2}", [0.01, 0.505, 1, 0.1, 0.1, 0.1]),
    ],
)
def test_learning_rates_follow_the_schedule_in_every_group(schedule, wanted):
    text = TINY.replace("epochs: 3", "epochs: 6").replace("lr: 1e-2}", f"lr: 1e-2}}\n  schedule: {schedule}")
    recipe = parse_recipe(text)
    parameters = [
        {"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr, "weight_decay": 0.0} for lr in (1e-2, 1e-2)
    ]
    optimizer = make_optimizer(recipe.training.optimizer, parameters)
    scheduler = make_scheduler(recipe.training, optimizer, 5)
    seen = []
    for step in range(30):
        if step % 5 == 0:
            seen.append([group["lr"] for group in optimizer.param_groups])
        scheduler.step_update(step + 1)
    for rates, share in zip(seen, wanted, strict=True):
        assert rates == pytest.approx([1e-2 * share] * 2, rel=2e-3)


def test_rates_of_roles_keep_their_ratio_under_a_schedule():
    text = TINY.replace("lr: 1e-2}", "lr: 1e-2, lr_by_role: {modulation: 1e-3}}\n  schedule: {name: cosine}")
    runner = Runner(parse_recipe(text), None, torch.device("cpu"), Lines())
    rates = {group["role"]: group["lr"] for group in runner.stepper.optimizer.param_groups}
    assert (rates["weight"], rates["modulation"]) == (1e-2, 1e-3)
    runner.stepper.scheduler.step_update(15)
    rates = {group["role"]: group["lr"] for group in runner.stepper.optimizer.param_groups}
    assert rates["modulation"] / rates["weight"] == pytest.approx(0.1)


def test_the_kernel_loss_makes_two_modes_where_there_was_one():
    """Fig. 3 and 4 in small; benchmarks/quickstart.py has the figures of the real run."""
    loss = "  - {type: kernel_loss, lambda: 1e-2, nu: 1e-2}\n"
    plain = TINY.split("  - {type: kernel_loss")[0]
    seen = {}
    for name, text in (("with", plain + loss), ("without", plain)):
        recipe = parse_recipe(text.replace("epochs: 3", "epochs: 4"))
        runner = Runner(recipe, None, torch.device("cpu"), Lines())
        for epoch in range(4):
            runner._epoch(epoch)
        layers = [m.weight.detach() for m in runner.model.modules() if hasattr(m, "modulation")]
        seen[name] = [valley(w) for w in layers]
    assert max(seen["with"]) < 0.5
    assert min(seen["without"]) > 0.9
    assert valley(torch.randn(100_000)) == pytest.approx(1.36, abs=0.05)


def test_mixed_precision_trains_and_packs_the_same_bits(tmp_path):
    recipe = parse_recipe(TINY.replace("epochs: 3", "epochs: 1\n  amp: bfloat16").replace("size: 8", "size: 8, pad: 1"))
    runner = Runner(recipe, tmp_path, torch.device("cpu"), Lines())
    assert runner.stepper.amp is torch.bfloat16
    runner.train(resume=False)
    assert runner.metrics[0]["loss"]["task"] > 0
    assert all(p.dtype is torch.float32 for p in runner.model.parameters())
    assert runner.finish().report.accuracy.identical_logits


def test_off_a_terminal_there_is_one_line_an_epoch(tmp_path):
    (tmp_path / "r.yaml").write_text(TINY.replace("epochs: 3", "epochs: 2"))
    command = [sys.executable, "-m", "bonn_plugin", "compress", "r.yaml", "--out", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert [line.split()[1] for line in done.stdout.splitlines() if line.startswith("epoch ")] == ["1/2", "2/2"]
    assert "verified out" in done.stdout


def test_importing_the_package_loads_neither_torch_nor_timm():
    script = "import sys, bonn_plugin; sys.exit('torch' in sys.modules or 'timm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
