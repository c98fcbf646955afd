"""``distill``: the loss against a slow reference, the teacher's place, and a user's mistakes."""

import math

import pytest
import safetensors.torch
import torch
from torch.nn import functional as F

from bonn_plugin import ModelConfig, Session, parse_recipe, save_packed
from bonn_plugin.errors import BonnError, SessionError
from bonn_plugin.functional import distillation_loss
from bonn_plugin.models import build_model
from bonn_plugin.recipe import RecipeError, recipe_model
from bonn_plugin.train import Quiet, Runner
from tests.conftest import TINY

DISTILL = "  - {type: distill, teacher: TEACHER, OPTIONS}\n"


def recipe(teacher, options="alpha: 0.5, temperature: 2", name="student"):
    text = TINY.replace("name: tiny", f"name: {name}") + DISTILL.replace("TEACHER", teacher).replace("OPTIONS", options)
    return parse_recipe(text, "student.yaml")


@pytest.fixture
def teacher(tmp_path):
    torch.manual_seed(5)
    config = ModelConfig(name="bonn_wrn22_16", num_classes=10, args={"depth": 10, "widths": [8, 8, 8]})
    model = build_model(config.name, 10, config.args).eval()
    save_packed(model, tmp_path / "teacher", config)
    return model


def prepared(session, seed=0):
    torch.manual_seed(seed)
    return session.prepare(recipe_model(session.recipe)).train()


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_loss_is_the_divergence_written_as_loops(temperature):
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(3, 5, generator=generator), torch.randn(3, 5, generator=generator)

    def softmax(row):
        powers = [math.exp(float(v) / temperature) for v in row]
        return [p / sum(powers) for p in powers]

    total = 0.0
    for ours, theirs in zip(student, teacher, strict=True):
        for q, p in zip(softmax(ours), softmax(theirs), strict=True):
            total += p * math.log(p / q)
    got = distillation_loss(student, teacher, temperature)
    assert float(got) == pytest.approx(temperature**2 * total / 3, rel=1e-5)


def test_at_temperature_one_the_gradient_is_that_of_reactnets_distributional_loss():
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(4, 6, generator=generator, requires_grad=True)
    teacher = torch.randn(4, 6, generator=generator)
    (ours,) = torch.autograd.grad(distillation_loss(student, teacher), student)
    loss = -(F.softmax(teacher, 1) * F.softmax(student, 1).log()).sum() / 4  # its -1/n sum sum p_R log(p_B / p_R)
    (theirs,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(ours, theirs)


def test_the_loss_of_equal_logits_is_zero_and_shapes_must_agree():
    logits = torch.randn(2, 3)
    assert float(distillation_loss(logits, logits.clone())) == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="the teacher's have"):
        distillation_loss(logits, torch.randn(2, 4))
    with pytest.raises(ValueError, match="positive"):
        distillation_loss(logits, logits, 0)


def test_the_session_adds_alpha_times_the_loss_and_the_teacher_is_no_part_of_the_student(teacher, tmp_path):
    session = Session(recipe(f"{{folder: '{tmp_path}/teacher'}}"), 1)
    model = prepared(session)
    images, labels = torch.randn(4, 3, 8, 8), torch.tensor([1, 2, 3, 4])
    logits = model(images)
    terms = session.loss(labels=labels, images=images, outputs=logits)
    with torch.no_grad():
        theirs = teacher(images)
    torch.testing.assert_close(terms["distill"], 0.5 * distillation_loss(logits, theirs, 2.0))
    terms.total.backward()
    ours = {id(p) for p in model.parameters()}
    assert {id(p) for group in session.param_groups() for p in group["params"]} <= ours | {
        id(p) for m in session.modifiers for x in m.modules().values() for p in x.parameters()
    }
    assert "teacher" not in str(session.state_dict().keys())
    assert not session.modifiers[2].modules()
    before = {n: t.clone() for n, t in session.modifiers[2]._teacher.state_dict().items()}
    session.step()
    after = session.modifiers[2]._teacher.state_dict()
    assert all(torch.equal(before[n], after[n]) for n in before), "the teacher's norms must not move"


def test_task_weight_takes_the_place_of_the_labels_in_the_window_only(teacher, tmp_path):
    options = "task_weight: 0, start: 1, end: 2"
    session = Session(recipe(f"{{folder: '{tmp_path}/teacher'}}", options), 1)
    model = prepared(session)
    images, labels = torch.randn(4, 3, 8, 8), torch.tensor([1, 2, 3, 4])
    for epoch in range(3):
        logits = model(images)
        terms = session.loss(labels=labels, images=images, outputs=logits)
        task = F.cross_entropy(logits, labels)
        whole = terms.with_task(task)
        if epoch == 1:
            torch.testing.assert_close(whole, terms["kernel"] + terms["distill"])
            with pytest.raises(SessionError, match=r"write `loss = session.loss\(...\).with_task\(task_loss\)`"):
                terms.total  # noqa: B018
        else:
            assert set(terms.terms) == {"kernel"}
            torch.testing.assert_close(whole, terms.total + task)
        whole.backward()
        session.step()


@pytest.mark.parametrize("given", [{"images": None}, {"outputs": None}])
def test_without_images_or_logits_it_names_the_line_to_write(teacher, tmp_path, given):
    session = Session(recipe(f"{{folder: '{tmp_path}/teacher'}}"), 1)
    model = prepared(session)
    images = torch.randn(4, 3, 8, 8)
    arguments = {"labels": torch.tensor([1, 2, 3, 4]), "images": images, "outputs": model(images), **given}
    with pytest.raises(SessionError, match=r"session.loss\(labels=y, images=x, outputs=logits\)"):
        session.loss(**arguments)


def test_a_timm_network_with_a_weights_file_teaches(tmp_path):
    torch.manual_seed(3)
    network = build_model("resnet10t", 10, {}).eval()
    safetensors.torch.save_file(network.state_dict(), tmp_path / "w.safetensors")
    session = Session(recipe(f"{{name: resnet10t, weights: '{tmp_path}/w.safetensors'}}"), 1)
    prepared(session)
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(session.modifiers[2].logits(images), network(images))


def fails(teacher, message, folder=None, **options):
    session = Session(recipe(teacher), 1)
    with pytest.raises(BonnError, match=message) as caught:
        session.prepare(recipe_model(session.recipe), folder=folder)
    assert str(caught.value).startswith("student.yaml:13:")
    assert "\n" not in str(caught.value)


def test_a_teacher_that_does_not_fit_is_one_line(tmp_path):
    fails("{folder: nowhere}", "the teacher: nowhere: no such folder")
    fails("{name: resnet10t, weights: nowhere.safetensors}", "nowhere.safetensors: can't be read")
    fails("{name: resnet11, weights: w}", "timm has no model named 'resnet11'")
    fails("{recipe: nothing}", "nothing: no such file, nor a shipped recipe")
    other = ModelConfig(name="bonn_wrn22_16", num_classes=7, args={"depth": 10, "widths": [8, 8, 8]})
    save_packed(build_model(other.name, 7, other.args).eval(), tmp_path / "seven", other)
    fails(f"{{folder: '{tmp_path}/seven'}}", r"the teacher makes \(7,\) of an image, the student has 10 classes")
    fails(f"{{folder: '{tmp_path}/seven'}}", "is this run's own folder", folder=tmp_path / "seven")
    one = ModelConfig(name="bonn_wrn22_16", num_classes=10, args={"depth": 10, "widths": [8, 8, 8], "in_chans": 1})
    save_packed(build_model(one.name, 10, one.args).eval(), tmp_path / "one", one)
    fails(f"{{folder: '{tmp_path}/one'}}", "does not take the student's images")
    network = build_model("resnet10t", 7, {})
    safetensors.torch.save_file(network.state_dict(), tmp_path / "w.safetensors")
    fails(f"{{name: resnet10t, weights: '{tmp_path}/w.safetensors'}}", r"'fc.weight' .* has shape \(7, 512\)")
    safetensors.torch.save_file({"fc.weight": torch.zeros(10, 512)}, tmp_path / "few.safetensors")
    fails(
        f"{{name: resnet10t, weights: '{tmp_path}/few.safetensors'}}", "has no 'conv1.0.weight', which resnet10t needs"
    )
    (tmp_path / "begun/training").mkdir(parents=True)
    fails(f"{{folder: '{tmp_path}/begun'}}", "is not finished")


@pytest.mark.parametrize(
    ("teacher", "said"),
    [
        ("{name: resnet18}", "missing key 'weights' in teacher"),
        ("{}", "missing key 'name' in teacher"),
        ("{folder: x, name: y}", "unknown key 'name' in teacher"),
        ("resnet18", "teacher must be"),
    ],
)
def test_a_teacher_that_is_no_teacher_is_told_at_its_place(teacher, said):
    with pytest.raises(RecipeError, match=said) as caught:
        recipe(teacher)
    assert all(line.startswith("student.yaml:13:") for line in str(caught.value).splitlines())


def test_a_run_of_another_recipe_teaches_and_the_checkpoint_stands_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = TINY.replace("name: tiny", "name: big").partition("modifiers:")[0].replace("epochs: 3", "epochs: 1")
    (tmp_path / "big.yaml").write_text(text)
    student = recipe("{recipe: big}", "task_weight: 0, end: 1")
    for name, what in (("big", parse_recipe(text)), ("student", student)):
        runner = Runner(what, tmp_path / "runs" / name, torch.device("cpu"), Quiet())
        runner.train(resume=False)
        report = runner.finish().report
    assert report.accuracy.identical_logits
    state = torch.load(tmp_path / "runs/student/training/state.pt", weights_only=True)
    assert "distill" in state["metrics"][0]["loss"]
    assert "distill" not in state["metrics"][1]["loss"]
    assert not any("teacher" in key for key in state["model"])
    packed = safetensors.torch.load_file(tmp_path / "runs/student/model.safetensors")
    assert not any("teacher" in key for key in packed)
