"""SWAG: the golden numbers in each official layout, and refusals in its own terms."""

from __future__ import annotations

import pytest
import torch

import ztp_deploy as ztp
from tests import golden, tiny
from tests.models import readings
from ztp_deploy import models
from ztp_deploy.errors import BadRequest, MissingSoftware
from ztp_deploy.models.swag import NAMES
from ztp_deploy.source import ModelSize

SIZE = ModelSize(img_size=96, patch_size=16, embed_dim=96, depth=6, num_heads=3, num_classes=100)
CASES = ["swag_tiny", "swag_tiny_eps", "torchvision_vit_tiny", "torchvision_vit_tiny_eps"]


def load(case: str, state: dict[str, torch.Tensor] | None = None) -> torch.nn.Module:
    return ztp.load_model("swag_vit_b16", weights=state or golden.state_dict(case), overrides=SIZE)


@pytest.mark.parametrize("case", CASES)
def test_the_official_numbers(case):
    readings.assert_reads(case, load(case))


def test_the_names_of_the_mlp_in_torchvisions_files():
    case = "torchvision_vit_tiny"
    old = {"mlp.0": "mlp.linear_1", "mlp.3": "mlp.linear_2"}
    state = golden.state_dict(case)
    for new, name in old.items():
        state = {key.replace(new, name): value for key, value in state.items()}
    assert "encoder.layers.encoder_layer_5.mlp.linear_2.bias" in state
    readings.assert_reads(case, load(case, state))


@pytest.mark.parametrize("case", ["swag_tiny_eps", "torchvision_vit_tiny_eps"])
def test_another_epsilon_is_seen(case):
    readings.assert_another_epsilon_is_seen(case, load(case))


def test_swapped_weights_are_seen():
    case = "swag_tiny"
    state = golden.state_dict(case)
    first, second = (f"encoder.layers.layer_{number}.self_attention.in_proj_weight" for number in (0, 1))
    state[first], state[second] = state[second], state[first]
    assert readings.change(case, load(case, state)) > 0.1


@pytest.mark.parametrize("name, image, patches", [*zip(NAMES, (384, 512, 518), (576, 1024, 1369), strict=True)])
def test_every_name_has_its_shape_and_loads(name, image, patches):
    _, geometry = models.describe(name)
    assert (geometry.image_size, geometry.patch_tokens) == (image, patches)
    assert (geometry.special_tokens, geometry.num_classes) == (1, 1000)
    preprocessing = tiny.model(name, ModelSize(depth=1, embed_dim=48, num_heads=3)).source.preprocessing
    assert preprocessing.input_size == (3, image, image)
    assert preprocessing.interpolation == "bicubic"
    assert preprocessing.mean == (0.485, 0.456, 0.406)
    assert preprocessing.std == (0.229, 0.224, 0.225)
    assert (preprocessing.crop_pct, preprocessing.crop_mode) == (1.0, "center")


@pytest.mark.parametrize(
    "case, block, position",
    [
        ("swag_tiny", "layer_2", (37, 1, 96)),
        ("torchvision_vit_tiny", "encoder_layer_2", (1, 37, 96)),
    ],
)
def test_wrong_keys_are_listed_in_the_layouts_own_terms(case, block, position):
    state = golden.state_dict(case)
    del state[f"encoder.layers.{block}.ln_1.weight"]
    state["heads.pre_logits.weight"] = torch.zeros(1)
    state["encoder.pos_embedding"] = torch.zeros(position[1], position[0], 96)
    with pytest.raises(BadRequest) as refusal:
        load(case, state)
    text = str(refusal.value)
    assert f"missing: encoder.layers.{block}.ln_1.weight;" in text
    assert "unexpected: heads.pre_logits.weight;" in text
    assert f"encoder.pos_embedding {tuple(state['encoder.pos_embedding'].shape)} instead of {position}" in text


def test_a_deeper_checkpoint_is_refused():
    shallow = SIZE.model_copy(update={"depth": 5})
    with pytest.raises(BadRequest, match=r"unexpected: encoder\.layers\.encoder_layer_5\.ln_1\.bias"):
        ztp.load_model("swag_vit_b16", weights=golden.state_dict("torchvision_vit_tiny"), overrides=shallow)


def test_licence_and_the_place_to_get_weights(tmp_path):
    path = tmp_path / "vit_b16_in1k.torch"
    torch.save(golden.state_dict("swag_tiny"), path)
    by_file = ztp.load_model("swag_vit_b16", weights=path, overrides=SIZE)
    assert by_file.source.weights.licence == "CC-BY-NC-4.0"
    assert by_file.source.weights.sha256 == load("swag_tiny").source.weights.sha256
    assert models.reload_model(by_file.source).source == by_file.source
    with pytest.raises(MissingSoftware, match=r"github\.com/facebookresearch/SWAG.*CC-BY-NC-4\.0.*--weights path"):
        ztp.load_model("swag_vit_b16", weights="pretrained")
