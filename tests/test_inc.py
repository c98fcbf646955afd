"""neural-compressor: our configuration in its calls, and the traps of that framework."""

import copy
import json
import sys

import pytest
import timm
import torch
from neural_compressor.torch.quantization import RTNConfig, TuningConfig, autotune, convert, get_all_config_set, prepare
from neural_compressor.torch.quantization.config import get_all_registered_configs

from bonn_plugin import ModelConfig, load_packed, save_packed
from bonn_plugin.errors import BonnError, ModelError, SessionError
from bonn_plugin.inc import BonnConfig, BonnPruningConfig, config_from_dict, kernel_loss, pruning_loss
from bonn_plugin.nn import BinaryConv2d, PackedConv2d
from tests import reference
from tests.conftest import randomize_norms

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def network(name="resnet18", **args):
    torch.manual_seed(0)
    return randomize_norms(timm.create_model(name, **args))


def names(model, kind=BinaryConv2d):
    return [n for n, m in model.named_modules() if isinstance(m, kind)]


@pytest.mark.parametrize(
    ("name", "white_list", "count"),
    [
        ("resnet18", None, 16),
        ("resnet50", None, 16),
        ("mobilenetv3_large_100", ["re:blocks\\..*\\.conv_pwl?"], 29),
        ("convnext_tiny", None, 3),
    ],
)
def test_prepare_train_convert_save_load(name, white_list, count, tmp_path):
    model = network(name)
    config = BonnConfig(white_list=white_list) if white_list else BonnConfig()
    model = prepare(model, config, example_inputs=IMAGES)
    assert len(names(model)) == count
    depthwise = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d) and m.groups > 1]
    assert all(type(m) is torch.nn.Conv2d for m in depthwise)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    model.train()
    before = kernel_loss(model).detach()
    (model(IMAGES).square().mean() + kernel_loss(model)).backward()
    optimizer.step()
    assert not torch.equal(kernel_loss(model).detach(), before)
    trained = copy.deepcopy(model).eval()
    packed = convert(model)
    assert len(names(packed, PackedConv2d)) == count
    folder = save_packed(packed, tmp_path, ModelConfig(name=name, num_classes=1000))
    with torch.no_grad():
        assert torch.equal(load_packed(folder)(IMAGES), trained(IMAGES))


def test_depthwise_convolutions_are_taken_when_asked_for():
    config = BonnConfig(white_list=["re:blocks\\..*\\.conv_dw"], lambda_=0)
    model = prepare(network("mobilenetv3_small_050"), config, example_inputs=IMAGES)
    assert names(model)
    assert all(model.get_submodule(n).geometry.groups > 1 for n in names(model))


def test_the_kernel_loss_at_hand_is_lambda_times_equation_9():
    model = prepare(network(), BonnConfig(lambda_=0.5, nu=0.01, white_list=["layer1.0.conv1"]), example_inputs=IMAGES)
    layer = model.layer1[0].conv1
    args = [t.detach() for t in (layer.weight, layer.modulation, layer.prior.mu, layer.prior.sigma)]
    assert float(kernel_loss(model).detach()) == pytest.approx(0.5 * reference.eq9_kernel(*args, 0.01), rel=1e-5)


def test_w_stays_positive_in_a_loop_without_a_session():
    torch.manual_seed(0)
    model = prepare(network(), BonnConfig(lambda_=0, white_list=["layer1.0.conv1"]), example_inputs=IMAGES).train()
    w = model.layer1[0].conv1.modulation
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)  # a step is longer than w
    seen = []
    for _ in range(6):
        seen.append(bool((w < 0).any()))
        optimizer.zero_grad()
        loss = model(IMAGES).square().mean()
        assert bool((w > 0).all())
        before = w.detach().clone()
        loss = loss + model(IMAGES + 1).square().mean()  # two passes a step, as a contrastive loss has them
        assert torch.equal(w, before)
        loss.backward()
        optimizer.step()
    assert sum(seen) > 3, "the optimizer alone takes it below zero"
    model.eval()
    expected = model(IMAGES)
    assert torch.equal(convert(model)(IMAGES), expected)


FORMS = {
    "object": lambda: BonnConfig(lambda_=2e-4),
    "flat dict": lambda: {"bonn": {"lambda": 2e-4}},
    "global and local": lambda: {
        "bonn": {"global": {"lambda": 2e-4}, "local": {"layer1.0.conv1": {"lambda": 2e-4, "ste": "polynomial"}}}
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_objects_and_dicts_mean_the_same(form):
    model = prepare(network(), FORMS[form](), example_inputs=IMAGES)
    assert len(names(model)) == 16
    assert model.layer1[0].conv1.ste == ("polynomial" if "local" in form else "clip")
    assert model.layer1[0].conv2.ste == "clip"
    kernel_loss(model)
    assert len(names(convert(model), PackedConv2d)) == 16


@pytest.mark.parametrize("text", ["lambda: 2e-4\nste: polynomial\n", "bonn:\n  lambda: 2e-4\n  ste: polynomial\n"])
def test_the_yaml_of_a_configuration(text, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    config = BonnConfig.from_yaml_file(tmp_path / "c.yaml")
    assert (config.lambda_, config.ste) == (2e-4, "polynomial")


@pytest.mark.parametrize(
    "config",
    [
        BonnConfig(nu=0.5),
        BonnConfig(white_list=["layer1.0.conv1", "re:layer2.*conv2"]),
        BonnConfig(white_list=[torch.nn.Conv2d]),
        BonnConfig(ste="polynomial").set_local("layer1.0.conv1", BonnConfig(threshold="never")),
    ],
)
def test_a_configuration_survives_dictionary_and_file(config, tmp_path):
    taken = config.get_model_info(network())
    again = BonnConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again.get_model_info(network()) == taken
    config.to_json_file(str(tmp_path / "c.json"))
    assert BonnConfig.from_json_file(tmp_path / "c.json").get_model_info(network()) == taken
    assert again.to_dict() == config.to_dict()


def _plain(settings):
    return {key: value for key, value in settings.items() if key != "non_tunable_params"}


def test_upstream_to_dict_forgets_the_white_list_and_from_json_file_raises(tmp_path):
    """The traps that this package's configuration mends; when they go, so can the mending."""
    theirs = RTNConfig(white_list=["fc"])
    again = RTNConfig.from_dict(json.loads(json.dumps(RTNConfig(white_list=None).to_dict()), object_hook=_plain))
    assert RTNConfig(white_list=None).global_config is None
    assert again.global_config is not None
    theirs.to_json_file(str(tmp_path / "c.json"))
    with pytest.raises(TypeError):
        RTNConfig.from_json_file(str(tmp_path / "c.json"))


def test_names_are_whole_names_and_one_that_matches_nothing_is_an_error():
    model = prepare(network(), BonnConfig(white_list=["layer1.0.conv1"], lambda_=0), example_inputs=IMAGES)
    assert names(model) == ["layer1.0.conv1"]
    with pytest.raises(ModelError, match=r"'layer1\.0\.conv9' matches no convolution.*Did you mean 'layer1\.0\.conv"):
        prepare(network(), BonnConfig(white_list=["layer1.0.conv9"]), example_inputs=IMAGES)
    with pytest.raises(ModelError, match="matches no convolution"):
        prepare(network(), {"bonn": {"local": {"layer9": {}}}}, example_inputs=IMAGES)


def test_settings_that_make_no_sense_are_refused():
    for settings in ({"lambda_": -1.0}, {"ste": "tanh"}, {"threshold": "sometimes"}, {"nu": 0.0}, {"bound": 0.0}):
        with pytest.raises(BonnError, match="BonnConfig"):
            BonnConfig(**settings)
    with pytest.raises(BonnError, match=r"unknown key 'lamda'.*Did you mean 'lambda_'"):
        BonnConfig.from_dict({"lamda": 1e-4})
    with pytest.raises(BonnError, match="not Linear"):
        BonnConfig(white_list=[torch.nn.Linear])


def test_binarising_twice_is_refused():
    model = prepare(network(), BonnConfig(lambda_=0), example_inputs=IMAGES)
    with pytest.raises(ModelError, match="binarised already"):
        prepare(model, BonnConfig(), example_inputs=IMAGES)


def test_a_kernel_loss_that_was_never_added_is_told():
    model = prepare(network(), BonnConfig(), example_inputs=IMAGES)
    with pytest.warns(UserWarning, match="never added"):
        convert(model)


def test_the_kernel_loss_belongs_to_a_prepared_model():
    with pytest.raises(SessionError, match="call prepare first"):
        kernel_loss(network())
    model = prepare(network(), BonnConfig(), example_inputs=IMAGES)
    kernel_loss(model)
    with pytest.raises(SessionError, match="call prepare first"):
        kernel_loss(convert(model))


def test_other_passes_do_not_take_hold_of_a_convolution_in_training():
    model = prepare(network(), BonnConfig(lambda_=0), example_inputs=IMAGES)
    others = [c for n, c in get_all_registered_configs().items() if n != "bonn"]
    assert len(others) > 3
    assert not [n for n in names(model) if isinstance(model.get_submodule(n), torch.nn.Conv2d)]


def test_autotune_over_other_configurations_works_while_we_are_registered():
    assert "bonn" in get_all_registered_configs()
    model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Linear(32, 32))
    best = autotune(
        model,
        TuningConfig(config_set=[RTNConfig(bits=[4, 8], group_size=16)], tolerable_loss=1.0),
        eval_fn=lambda m: 1.0,
    )
    assert best is not None
    sets = get_all_config_set()
    assert any(isinstance(s, BonnConfig) for s in sets)


def test_autotune_with_our_configuration_packs_without_training():
    model = network("resnet10t", num_classes=10)
    best = autotune(
        model,
        TuningConfig(config_set=[BonnConfig(threshold="never")]),
        eval_fn=lambda m: float(m(IMAGES).isfinite().all()),
        example_inputs=IMAGES,
    )
    assert names(best, PackedConv2d)


def test_a_composed_configuration_keeps_our_global_part():
    model = prepare(network(), BonnConfig(lambda_=0) + RTNConfig(white_list=["nothing"]), example_inputs=IMAGES)
    assert len(names(model)) == 16


def test_without_importing_the_face_nothing_of_the_framework_is_loaded():
    import subprocess

    script = "import sys, bonn_plugin, bonn_plugin.session; sys.exit('neural_compressor' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def merged_names(model):
    return [n for n in names(model, PackedConv2d) if model.get_submodule(n).weight_index is not None]


def train_a_step(model, progress=1.0):
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    model.train()
    for share in (0.0, progress):
        optimizer.zero_grad()
        (model(IMAGES).square().mean() + kernel_loss(model) + pruning_loss(model, share)).backward()
        optimizer.step()
    return model


BOTH = {
    "composed objects": lambda m: prepare(m, BonnConfig() + BonnPruningConfig(keep=0.5), example_inputs=IMAGES),
    "one after the other": lambda m: prepare(
        prepare(m, BonnConfig(), example_inputs=IMAGES), BonnPruningConfig(keep=0.5), example_inputs=IMAGES
    ),
    "our dictionary": lambda m: prepare(
        m, config_from_dict({"bonn": {"lambda": 1e-4}, "bonn_pruning": {"keep": 0.5}}), example_inputs=IMAGES
    ),
    "dictionaries one after the other": lambda m: prepare(
        prepare(m, {"bonn": {}}, example_inputs=IMAGES), {"bonn_pruning": {"keep": 0.5}}, example_inputs=IMAGES
    ),
}


@pytest.mark.parametrize("form", BOTH)
def test_both_algorithms_work_on_the_same_layers(form, tmp_path):
    model = train_a_step(BOTH[form](network("resnet10t", num_classes=10)))
    trained = copy.deepcopy(model).eval()
    packed = convert(model)
    assert names(packed, PackedConv2d) == merged_names(packed)
    for name in merged_names(packed):
        layer = packed.get_submodule(name)
        assert layer.unique_filters <= layer.geometry.out_channels // 2
    folder = save_packed(packed, tmp_path, ModelConfig(name="resnet10t", num_classes=10))
    with torch.no_grad():
        assert torch.equal(load_packed(folder)(IMAGES), trained(IMAGES))


def test_the_pruning_algorithm_has_an_op_type_of_its_own_and_comes_first():
    from neural_compressor.torch.utils.utility import algos_mapping

    order = list(algos_mapping)
    assert order.index("bonn_pruning") < order.index("bonn")
    assert {kind for _, kind in BonnPruningConfig().get_model_info(network())} == {"Conv2d.prune"}


def test_upstream_a_dictionary_with_two_algorithms_loses_the_second_in_silence():
    """The trap that ``config_from_dict`` is for."""
    model = prepare(network(), {"bonn": {"lambda": 0}, "bonn_pruning": {"keep": 0.5}}, example_inputs=IMAGES)
    assert names(model)
    assert all(model.get_submodule(n).merge is None for n in names(model))


def test_pruning_can_be_confined_to_some_layers():
    config = BonnConfig(lambda_=0) + BonnPruningConfig(keep=0.25, white_list=["layer4.1.conv2"])
    model = prepare(network(), config, example_inputs=IMAGES)
    pruning_loss(model, 1.0)
    packed = convert(model)
    assert len(names(packed, PackedConv2d)) == 16
    assert merged_names(packed) == ["layer4.1.conv2"]
    assert packed.layer4[1].conv2.unique_filters <= 128


def test_pruning_what_is_not_binarised_is_refused():
    with pytest.raises(ModelError, match=r"BonnConfig\(\) \+ BonnPruningConfig\(\)"):
        prepare(network(), BonnPruningConfig())


def test_pruning_that_was_never_added_is_told_and_done():
    model = prepare(network(), BonnConfig(lambda_=0) + BonnPruningConfig(keep=0.5), example_inputs=IMAGES)
    with pytest.warns(UserWarning, match="without learning"):
        packed = convert(model)
    assert len(merged_names(packed)) == 16


def test_the_pruning_loss_checks_its_progress_and_its_model():
    model = prepare(network("resnet10t"), BonnConfig() + BonnPruningConfig(), example_inputs=IMAGES)
    with pytest.raises(SessionError, match="from 0 to 1"):
        pruning_loss(model, 1.5)
    with pytest.raises(SessionError, match="call prepare first"):
        pruning_loss(network("resnet10t"), 0.5)
    with pytest.raises(BonnError, match="BonnPruningConfig: keep"):
        BonnPruningConfig(keep=0.0)
    with pytest.raises(BonnError, match=r"no algorithm of this package.*Did you mean 'bonn_pruning'"):
        config_from_dict({"bonn_prunin": {}})
