"""Models by name: sources, random and given weights, refusals."""

from __future__ import annotations

import pickle

import pytest
import safetensors.torch
import timm
import torch

import ztp_deploy as ztp
from tests import tiny
from ztp_deploy import models
from ztp_deploy.errors import BadRequest, MissingSoftware
from ztp_deploy.models import swag
from ztp_deploy.models.layouts import HUGGING_FACE
from ztp_deploy.models.timm_vit import NAMES
from ztp_deploy.pruning.tokens import initial_state
from ztp_deploy.source import ModelSize, Weights


@pytest.mark.parametrize("name", NAMES)
def test_every_name_has_a_timm_architecture_of_the_right_shape(name):
    _, geometry = models.describe(name)
    side = 112 if name == "vit_digits" else 384 if name.endswith("_384") else 224
    assert geometry.image_size == side
    assert geometry.special_tokens == (2 if "distilled" in name else 1)
    assert geometry.num_classes == (10 if name == "vit_digits" else 1000)


def test_random_weights_are_the_same_everywhere_and_spread_attention():
    one, two = tiny.model(), tiny.model()
    assert one.source.weights.kind == "random"
    assert one.source.weights.sha256 == two.source.weights.sha256
    assert one.source.weights.sha256 == "8666a2503742d1c8517dd3a98eebfe8b42cd6433b32d0d4c630b31b192c4f3e7"
    images = torch.from_numpy(tiny.images(2))
    with torch.inference_mode():
        tokens = models.host_of(one).embed(images)
        attention = models.host_of(one).attention(one.blocks[0], tokens, initial_state(images, 36))
    entropy = -(attention.probabilities * attention.probabilities.log()).sum(-1).mean()
    assert 0.3 < entropy / torch.log(torch.tensor(37.0)) < 0.95


def test_the_source_says_what_the_model_is():
    source = ztp.load_model("augreg_vit_t", weights="random").source
    assert source.architecture == "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    assert source.preprocessing.mean == (0.5, 0.5, 0.5)
    assert source.preprocessing.crop_pct == 0.9
    assert source.labels is not None
    assert source.labels[0].startswith("tench")
    assert tiny.model().source.labels is None  # ten classes of its own
    with pytest.raises(Exception, match="frozen"):
        source.name = "other"


def test_auto_falls_back_loudly_and_pretrained_refuses(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("ztp_deploy.models.weights.find_pretrained", _no_hub)
    with pytest.warns(models.RandomWeightsWarning, match="predictions mean nothing"):
        model = ztp.load_model("deit_t")
    assert model.source.weights.kind == "random"
    with pytest.raises(MissingSoftware, match="hub"):
        ztp.load_model("deit_t", weights="pretrained")


def _no_hub(repository):
    raise MissingSoftware("the hub cannot be reached.", "Connect.")


@pytest.mark.parametrize("container", [None, "model", "state_dict", "state_dict_ema"])
def test_official_layouts_load(container, tmp_path):
    state = {f"module.{name}": value for name, value in tiny.model().state_dict().items()}
    wrapped = {container: state, "epoch": 3} if container else state
    by_dict = ztp.load_model("deit_t", weights=wrapped, overrides=tiny.SIZE)
    torch.save(wrapped, tmp_path / "checkpoint.pth")
    by_file = ztp.load_model("deit_t", weights=tmp_path / "checkpoint.pth", overrides=tiny.SIZE)
    assert by_dict.source.weights.kind == "given"
    assert by_file.source.weights.kind == "file"
    assert by_file.source.weights.sha256 == by_dict.source.weights.sha256 == tiny.model().source.weights.sha256


def under(prefix, state):
    return {prefix + name: value for name, value in state.items()}


@pytest.mark.parametrize(
    "prefix", ["module.", "model.", "net.", "backbone.", "_orig_mod.", "module.model.", "module._orig_mod.model.vit."]
)
@pytest.mark.parametrize("container", [None, "state_dict"])
def test_what_wrappers_put_before_every_key_is_taken_off(prefix, container):
    state = under(prefix, tiny.model().state_dict())
    loaded = ztp.load_model("deit_t", {container: state, "epoch": 3} if container else state, tiny.SIZE)
    assert loaded.source.weights.sha256 == tiny.model().source.weights.sha256


def test_a_prefix_is_taken_off_publishers_layouts_and_weights_of_methods_too():
    state = tiny.model().state_dict()
    torch.manual_seed(0)
    carried = {"score_predictor.0.in_conv.1.bias": torch.randn(3)}
    model = ztp.load_model("deit_t", under("module.model.", state | carried), tiny.SIZE)
    assert list(models.method_weights_of(model, "dynamicvit")) == list(carried)
    official = HUGGING_FACE[0].write(state)
    loaded = ztp.load_model("deit_t", under("model.", official), tiny.SIZE)
    assert loaded.source.weights.sha256 == tiny.model().source.weights.sha256


def test_what_the_model_itself_begins_with_is_no_prefix():
    """All keys begin with `blocks`, as some of the model's do."""
    blocks = {name: value for name, value in tiny.model().state_dict().items() if name.startswith("blocks.")}
    with pytest.raises(BadRequest, match=r"missing: cls_token, head\.bias, .*, norm\.weight and 3 more\.") as refusal:
        ztp.load_model("deit_t", blocks, tiny.SIZE)
    assert "unexpected" not in str(refusal.value)


@pytest.mark.parametrize(
    "change, words",
    [
        (
            lambda state: {**under("model.", state), "criterion.weight": torch.ones(10)},
            "56 of 57 keys .*'model.*criterion.w",
        ),
        (
            lambda state: under("student.", state) | under("teacher.", state),
            "56 of 112 keys .*'student.*such as teacher",
        ),
        (
            lambda state: {**under("module.", dict(list(state.items())[:2])), **dict(list(state.items())[2:])},
            "2 of 56 ",
        ),
        (
            lambda state: under("module.", under("model.vit.", state) | {"loss.w": torch.ones(1)}),
            "'model.vit.'.* loss.w",
        ),
    ],
    ids=["loss", "two models", "two keys", "below another"],
)
def test_a_prefix_of_some_keys_is_not_guessed(change, words):
    with pytest.raises(BadRequest, match=words) as refusal:
        ztp.load_model("deit_t", change(tiny.model().state_dict()), tiny.SIZE)
    assert "Save the state dict of the model alone" in refusal.value.fix


def test_a_few_keys_of_another_model_are_no_prefix():
    state = {"trunk.norm.weight": torch.ones(48), "trunk.layer.weight": torch.ones(48), "fc.bias": torch.ones(10)}
    with pytest.raises(BadRequest, match=r"unexpected: fc.bias, trunk.layer.weight, trunk.norm.weight\."):
        ztp.load_model("deit_t", state, tiny.SIZE)


def test_of_keys_that_do_not_fit_the_first_few_are_listed():
    state = tiny.model().state_dict()
    strange = {name.replace("blocks", "layers"): value for name, value in state.items()}
    with pytest.raises(BadRequest) as refusal:
        ztp.load_model("deit_t", strange, tiny.SIZE)
    more = sum(name.startswith("blocks") for name in state) - 5
    for kind, room in (("missing", "blocks"), ("unexpected", "layers")):
        first = [f"{room}.0.attn.{part}" for part in ("proj.bias", "proj.weight", "qkv.bias", "qkv.weight")]
        assert f"{kind}: {', '.join(first)}, {room}.0.mlp.fc1.bias and {more} more" in refusal.value.problem
    kept = {name: value for name, value in state.items() if name not in sorted(state)[:5]}
    with pytest.raises(BadRequest) as refusal:
        ztp.load_model("deit_t", kept, tiny.SIZE)
    assert refusal.value.problem.endswith(f"missing: {', '.join(sorted(state)[:5])}.")


@pytest.mark.parametrize(
    "name, layout, key, count",
    [
        ("deit_t", None, "pos_embed", 1),
        ("deit_t_distilled", None, "pos_embed", 2),
        ("deit_t", HUGGING_FACE[0], "vit.embeddings.position_embeddings", 1),
        ("swag_vit_b16", swag.LAYOUTS[-1], "encoder.pos_embedding", 1),
    ],
)
def test_positions_of_other_images_are_said_to_be_so(name, layout, key, count):
    """128 pixels are 8 rows of 8 patches; the model's 96 are 6 of 6."""
    larger = tiny.model(name, tiny.SIZE.model_copy(update={"img_size": 128, "num_classes": 7})).state_dict()
    state = layout.write(larger) if layout else larger
    with pytest.raises(BadRequest) as refusal:
        ztp.load_model(name, state, tiny.SIZE)
    shape = state[key].shape
    assert (
        f"{key} {tuple(shape)} instead of {tuple(36 + count if side == 64 + count else side for side in shape)}"
        in str(refusal.value)
    )
    assert "It is for images of 128 pixels: positions are not resampled here." in refusal.value.problem
    assert "--img-size 128" in refusal.value.fix
    assert "resample the positions when fine-tuning" in refusal.value.fix
    assert layout or "--num-classes 7 --img-size 128, " in refusal.value.fix
    size = tiny.SIZE.model_copy(update={"img_size": 128, "num_classes": 7})
    assert models.host_of(ztp.load_model(name, state, size)).geometry.image_size == 128


@pytest.mark.parametrize("tokens", [51, 12])
def test_positions_that_make_no_square_name_no_size(tokens):
    state = {**tiny.model().state_dict(), "pos_embed": torch.zeros(1, tokens, 48)}
    with pytest.raises(
        BadRequest, match="It has positions for another number of patches: positions are not resampled here"
    ) as refusal:
        ztp.load_model("deit_t", state, tiny.SIZE)
    assert "--num-classes or --img-size, in Python" in refusal.value.fix


def test_patches_of_another_size_are_not_taken_for_images_of_another():
    """96 pixels in patches of 8 have as many positions as 192 in patches of 16."""
    state = tiny.model("deit_t", tiny.SIZE.model_copy(update={"patch_size": 8})).state_dict()
    with pytest.raises(BadRequest, match="positions for another number of patches") as refusal:
        ztp.load_model("deit_t", state, tiny.SIZE)
    assert "192" not in str(refusal.value)


def test_of_several_sets_of_weights_one_is_chosen(tmp_path):
    plain, ema = tiny.model().state_dict(), tiny.model().state_dict()
    ema["head.bias"] = ema["head.bias"] + 1
    path = tmp_path / "both.pth"
    torch.save({"state_dict": plain, "state_dict_ema": ema, "optimizer": {"lr": 1}}, path)
    with pytest.raises(BadRequest, match="several sets of weights: state_dict, state_dict_ema") as refusal:
        ztp.load_model("deit_t", weights=path, overrides=tiny.SIZE)
    assert ":state_dict_ema" in refusal.value.fix
    model = ztp.load_model("deit_t", weights=f"{path}:state_dict_ema", overrides=tiny.SIZE)
    assert torch.equal(model.head.bias, ema["head.bias"])
    assert model.source.weights.shown == "file (both.pth:state_dict_ema)"
    assert models.reload_model(model.source).source == model.source
    models.check_request("deit_t", f"{path}:state_dict_ema")
    with pytest.raises(BadRequest, match="nothing under 'ema'; it has state_dict, state_dict_ema, optimizer"):
        ztp.load_model("deit_t", weights=f"{path}:ema", overrides=tiny.SIZE)
    torch.save(plain, path)
    with pytest.raises(BadRequest, match="nothing under 'ema'; it has no containers"):
        ztp.load_model("deit_t", weights=f"{path}:ema", overrides=tiny.SIZE)
    path.rename(tmp_path / "a:model")
    assert ztp.load_model("deit_t", weights=tmp_path / "a:model", overrides=tiny.SIZE).source.weights.kind == "file"


def test_safetensors_load_and_a_cut_file_is_refused(tmp_path):
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(tiny.model().state_dict(), path)
    assert ztp.load_model("deit_t", weights=str(path), overrides=tiny.SIZE).source.weights.kind == "file"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(BadRequest, match="safetensors"):
        ztp.load_model("deit_t", weights=path, overrides=tiny.SIZE)


def test_wrong_keys_are_listed():
    state = tiny.model().state_dict()
    state["extra.weight"] = torch.zeros(1)
    del state["cls_token"]
    state["head.bias"] = torch.zeros(3)
    with pytest.raises(BadRequest) as refusal:
        ztp.load_model("deit_t", weights=state, overrides=tiny.SIZE)
    text = str(refusal.value)
    assert "missing: cls_token" in text
    assert "unexpected: extra.weight" in text
    assert "head.bias (3,) instead of (10,)" in text


@pytest.mark.parametrize(
    "value, reason",
    [
        (torch.full((48,), float("nan")), "NaN"),
        (torch.zeros(48, dtype=torch.complex64), "complex"),
        (torch.zeros(48).to_sparse(), "plain values"),
        ("text", "not a tensor"),
    ],
)
def test_values_that_are_no_weights_are_refused(value, reason):
    state = {**tiny.model().state_dict(), "norm.bias": value}
    with pytest.raises(BadRequest, match=reason):
        ztp.load_model("deit_t", weights=state, overrides=tiny.SIZE)


def test_unknown_containers_are_answered_with_the_known_ones():
    state = {"epoch": 3, "net": tiny.model().state_dict()}
    with pytest.raises(BadRequest, match=r"dicts under net.*under model, model_ema, .*with :net behind it"):
        ztp.load_model("deit_t", weights=state, overrides=tiny.SIZE)


@pytest.mark.parametrize("name", ["empty.pt", "text.pth", "text.npz", "none.npz"])
def test_files_that_are_no_checkpoints_are_refused(name, tmp_path):
    if not name.startswith("none"):
        (tmp_path / name).write_text("" if name.startswith("empty") else "hello")
    with pytest.raises(BadRequest, match=name.replace(".", r"\.")):
        ztp.load_model("augreg_vit_t", weights=tmp_path / name)


class _Evil:
    def __reduce__(self):
        return print, ("code ran",)


def test_pickled_code_does_not_run(tmp_path, capsys):
    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"model": _Evil()}))
    with pytest.raises(BadRequest, match="plain torch checkpoint"):
        ztp.load_model("deit_t", weights=tmp_path / "evil.pth")
    assert "code ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"name_or_module": "deit_x"}, "deit_"),
        ({"name_or_module": "resnet50", "weights": "random"}, "No family"),
        ({"name_or_module": "deit_t", "weights": "no/such/file.pth"}, "is not a file"),
        ({"name_or_module": "deit_t", "weights": "random", "overrides": ModelSize(embed_dim=50, num_heads=3)}, "50"),
        (
            {"name_or_module": "deit_t", "weights": "random", "overrides": ModelSize(img_size=230)},
            r"img_size=230 is not a multiple of patch_size=16: 6 rows .* Use img_size=224 or 240",
        ),
        ({"name_or_module": "deit_t", "weights": "random", "overrides": ModelSize(patch_size=15)}, "224 .*15: 14 rows"),
        ({"name_or_module": "eva02_tiny_patch14_224", "weights": "random"}, "no classifier"),
        ({"name_or_module": "deit_t", "weights": 3}, "weights=3 are not weights"),
        ({"name_or_module": "deit_t", "overrides": {"classes": 3}}, "no size classes=3.*num_classes"),
        ({"name_or_module": "deit_t", "overrides": 3}, "overrides=3 are not sizes"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(BadRequest, match=message):
        ztp.load_model(**arguments)


def test_sizes_in_a_dict_are_sizes():
    model = ztp.load_model("deit_t", "random", {"num_classes": 3, "depth": 1})
    assert models.source_of(model).size == ModelSize(num_classes=3, depth=1)


def test_blocks_of_another_kind_are_refused():
    parallel = timm.create_model("vit_small_patch16_36x1_224", depth=1)
    with pytest.raises(BadRequest, match="plain Block"):
        models.host_of(timm.create_model("vit_tiny_patch16_224", depth=1, block_fn=_OtherBlock))
    assert models.host_of(parallel).geometry.depth == 1


class _OtherBlock(timm.models.vision_transformer.Block):
    pass


def test_reload_gives_the_very_same_weights(tmp_path):
    model = tiny.model()
    assert models.reload_model(model.source).source == model.source
    path = tmp_path / "weights.pth"
    torch.save(model.state_dict(), path)
    by_file = ztp.load_model("deit_t", weights=path, overrides=tiny.SIZE)
    state = model.state_dict()
    state["head.bias"] = state["head.bias"] + 1
    torch.save(state, path)
    with pytest.raises(BadRequest, match="not the ones"):
        models.reload_model(by_file.source)
    given = ztp.load_model("deit_t", weights=state, overrides=tiny.SIZE)
    with pytest.raises(BadRequest, match="handed over in Python"):
        models.reload_model(given.source)


def test_weights_of_a_file_are_shown_by_its_name():
    """Reports are passed on: they hold no path of the machine that made them."""
    facts = {"licence": None, "sha256": "0"}
    assert Weights(kind="file", origin="/home/me/models/mine.pth", **facts).shown == "file (mine.pth)"
    assert Weights(kind="pretrained", origin="timm/deit_s", **facts).shown == "pretrained (timm/deit_s)"
