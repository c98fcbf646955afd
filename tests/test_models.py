"""The networks are those of the paper."""

import pytest
import timm
import torch

import bonn_plugin.models
from bonn_plugin.nn import BinaryConv2d, replace_module


@pytest.mark.parametrize(
    ("name", "parameters", "convolutions"),
    [("bonn_wrn22_16", 272_282, 18), ("bonn_wrn22_64", 4_326_986, 18), ("bonn_wrn40_16", 563_930, 36)],
)
def test_wide_resnets_have_the_papers_number_of_parameters(name, parameters, convolutions):
    model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == parameters
    inner = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(inner) == convolutions + 1


def test_the_wide_one_alone_drops_out():
    assert timm.create_model("bonn_wrn22_64").layer1[0].drop.p == 0.3
    assert timm.create_model("bonn_wrn22_16").layer1[0].drop.p == 0.0


@pytest.mark.parametrize(("name", "blocks"), [("bonn_resnet18", 16), ("bonn_resnet34", 32)])
def test_residual_networks_have_one_shortcut_a_convolution(name, blocks):
    model = timm.create_model(name)
    own = [m for m in model.modules() if isinstance(m, bonn_plugin.models.resnet.BiRealBlock)]
    assert len(own) == blocks
    assert [n for n, m in model.named_modules() if n.endswith("downsample.1")] == [
        f"layer{i}.0.downsample.1" for i in (2, 3, 4)
    ]


@pytest.mark.parametrize("name", ["bonn_resnet18", "bonn_resnet34", "bonn_wrn22_16", "bonn_wrn22_64", "bonn_wrn40_16"])
def test_timms_contract(name):
    model = timm.create_model(name, num_classes=7, in_chans=1).eval()
    x = torch.randn(2, 1, 32, 32)
    assert model(x).shape == (2, 7)
    assert model.get_classifier().out_features == 7
    assert model.forward_head(model.forward_features(x), pre_logits=True).shape == (2, model.num_features)
    model.reset_classifier(0)
    assert model(x).shape == (2, model.num_features)


@pytest.mark.parametrize("name", ["bonn_resnet18", "bonn_wrn22_16"])
def test_backbones_give_features_at_the_stated_reductions(name):
    body = timm.create_model(name, features_only=True)
    features = body(torch.randn(1, 3, 64, 64))
    for feature, channels, reduction in zip(
        features, body.feature_info.channels(), body.feature_info.reduction(), strict=True
    ):
        assert feature.shape == (1, channels, 64 // reduction, 64 // reduction)


@pytest.mark.parametrize("norm", ["before", "after"])
@pytest.mark.parametrize("shortcut", ["block", "conv"])
def test_the_residual_network_against_its_definition(shortcut, norm):
    args = {"depths": [2, 2], "widths": [4, 6], "num_classes": 3, "shortcut": shortcut, "norm": norm}
    model = timm.create_model("bonn_resnet18", **args)
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(torch.sin(torch.arange(p.numel()) + i).view(p.shape))
    model.eval()
    image = torch.randn(2, 3, 16, 16)

    def made(x, conv, bn):
        return conv(bn(x)) if norm == "before" else bn(conv(x))

    with torch.no_grad():
        x = model.maxpool(model.act1(model.bn1(model.conv1(image))))
        for block in [*model.layer1, *model.layer2]:
            around = block.downsample(x)
            if shortcut == "conv":
                x = block.act(made(x, block.conv, block.bn) + around)
            else:
                x = block.act1(made(x, block.conv1, block.bn1))
                x = block.act2(made(x, block.conv2, block.bn2) + around)
        assert torch.equal(model(image), model.fc(x.mean((2, 3))))
    assert sum(isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3) for m in model.modules()) == 4


@pytest.mark.parametrize("args", [{"shortcut": "none"}, {"norm": "none"}, {"shortcut": "block", "depths": [1, 2]}])
def test_a_residual_network_that_makes_no_sense_is_refused(args):
    with pytest.raises(ValueError, match=r"unknown shortcut|unknown norm|two convolutions at a time"):
        timm.create_model("bonn_resnet18", **{"widths": [4, 6], "depths": [2, 2], **args})


@pytest.mark.parametrize("shortcut", ["block", "conv"])
def test_the_wide_resnet_against_its_definition(shortcut):
    model = timm.create_model("bonn_wrn22_16", depth=10, shortcut=shortcut).eval()
    x = torch.randn(2, 3, 16, 16)
    f = torch.nn.functional
    y = model.conv1(x)
    for stage in ("layer1", "layer2", "layer3"):
        for block in getattr(model, stage):
            pre = f.relu(block.bn1(y))
            around = block.shortcut(pre) if block.shortcut is not None else y
            z = block.conv1(pre)
            if shortcut == "conv":
                z = z + around
                around = z
            y = block.conv2(f.relu(block.bn2(z))) + around
    wanted = model.fc(f.relu(model.bn(y)).mean((2, 3)))
    assert torch.allclose(model(x), wanted, atol=1e-5)


def test_a_binarised_convolution_of_the_wide_resnet_sees_both_signs():
    model = timm.create_model("bonn_wrn22_16", depth=10)
    seen = {}
    for name in ("layer1.0.conv1", "layer2.0.conv2"):
        replace_module(model, name, BinaryConv2d(model.get_submodule(name)))
        model.get_submodule(name).register_forward_pre_hook(lambda m, a, n=name: seen.update({n: a[0]}))
    model(torch.randn(4, 3, 16, 16))
    for x in seen.values():
        assert 0.3 < float((x < 0).float().mean()) < 0.7


@pytest.mark.parametrize("args", [{"depth": 21}, {"widths": [1, 2]}, {"shortcut": "none"}])
def test_a_wide_resnet_that_makes_no_sense_is_refused(args):
    with pytest.raises(ValueError, match=r"6n|three stages|shortcut"):
        timm.create_model("bonn_wrn22_16", **args)


@pytest.mark.parametrize("name", ["bonn_resnet18", "bonn_resnet34", "bonn_wrn22_16"])
def test_intermediate_maps_are_those_of_the_stages(name):
    model = timm.create_model(name).eval()
    seen = {}
    for entry in model.feature_info:
        model.get_submodule(entry["module"]).register_forward_hook(
            lambda m, a, out, n=entry["module"]: seen.setdefault(n, out)
        )
    x = torch.randn(1, 3, 64, 64)
    last, maps = model.forward_intermediates(x)
    assert len(maps) == len(model.feature_info)
    for entry, made in zip(model.feature_info, maps, strict=True):
        assert torch.equal(made, seen[entry["module"]])
        assert made.shape == (1, entry["num_chs"], 64 // entry["reduction"], 64 // entry["reduction"])
    assert torch.equal(last, model.forward_features(x))
    assert torch.equal(model.forward_intermediates(x, norm=True, intermediates_only=True)[-1], last)
    (only,) = model.forward_intermediates(x, indices=[1], stop_early=True, intermediates_only=True)
    assert torch.equal(only, maps[1])
    for indices in (2, [-2, -1]):
        some = model.forward_intermediates(x, indices=indices, intermediates_only=True)
        assert all(torch.equal(a, b) for a, b in zip(some, maps[-2:], strict=True))


@pytest.mark.parametrize("name", ["bonn_resnet18", "bonn_wrn22_16"])
@pytest.mark.parametrize("cls", ["getter", "list"])
def test_timms_feature_getters_take_the_networks_and_leave_nothing_dead(name, cls):
    body = timm.create_model(name, features_only=True, feature_cls=cls, out_indices=(0, 1))
    maps = body(torch.randn(2, 3, 64, 64))
    assert [m.shape[1] for m in maps] == body.feature_info.channels()
    assert [64 // m.shape[2] for m in maps] == body.feature_info.reduction()
    sum(m.sum() for m in maps).backward()
    assert not [n for n, p in body.named_parameters() if p.grad is None]


@pytest.mark.parametrize("indices", [[7], [-9], 0, 9, []])
def test_a_map_that_is_not_there_is_refused(indices):
    with pytest.raises(ValueError, match="feature maps"):
        timm.create_model("bonn_wrn22_16").forward_intermediates(torch.zeros(1, 3, 16, 16), indices=indices)
    with pytest.raises(ValueError, match="NCHW"):
        timm.create_model("bonn_wrn22_16").forward_intermediates(torch.zeros(1, 3, 16, 16), output_fmt="NLC")
