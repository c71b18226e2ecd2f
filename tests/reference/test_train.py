"""The training of the reference classifier, in small: every part of it, and that it learns."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ztp_deploy.reference import train
from ztp_deploy.reference.model import vit_digits


@pytest.fixture(scope="module")
def drawn():
    return train.Canvases(48)


def test_canvases_become_normalised_batches(drawn):
    chosen = torch.tensor([3, 9])
    images, labels, coverage = drawn.batch(chosen, 0.0)
    assert images.shape == (2, 3, 112, 112)
    assert labels.tolist() == drawn.labels[chosen].tolist()
    assert coverage.shape == (2, 196)
    back = images.numpy().transpose(0, 2, 3, 1) * 0.25 + 0.5
    assert np.abs(back - drawn.pixels[chosen].numpy() / 255).max() < 1e-5
    half = drawn.batch(chosen, 0.5)[0].numpy().transpose(0, 2, 3, 1) * 0.25 + 0.5
    assert np.abs(half - (drawn.pixels[chosen].float() + drawn.plain[chosen].float()).numpy() / 510).max() < 1e-5


@pytest.mark.parametrize("side", [7, 10])
def test_windows_are_square_and_hold_the_digit(drawn, side):
    chosen = train.windows(drawn.coverage, side, torch.Generator().manual_seed(0))
    assert chosen.shape == (48, side**2)
    rows, columns = chosen // train.GRID, chosen % train.GRID
    assert torch.equal(rows.amax(1) - rows.amin(1), torch.full((48,), side - 1))
    assert torch.equal(columns.amax(1) - columns.amin(1), torch.full((48,), side - 1))
    held = drawn.coverage.gather(1, chosen).sum(1) / drawn.coverage.sum(1)
    assert held.min() > 0.8
    assert (held >= 0.95).float().mean() > 0.9


def test_a_window_is_the_model_on_those_patches_alone():
    """All patches chosen in order is timm's own forward pass; a window is another."""
    model = vit_digits().eval()
    images = torch.randn(2, 3, 112, 112)
    with torch.no_grad():
        own = model.forward_features(images)
        every = torch.arange(196).expand(2, -1)
        torch.testing.assert_close(train.features(model, images, None), own)
        torch.testing.assert_close(train.features(model, images, every), own)
        window = train.features(model, images, every[:, :49])
    assert window.shape == (2, 50, 144)
    assert (window[:, 0] - own[:, 0]).abs().max() > 1e-3


def test_canvases_get_harder_only_while_most_are_read():
    ease = train.Ease(1.0, enough=0.7, step=0.1)
    for _ in range(100):
        ease.update(0.6)
    assert ease.value == 1.0
    for _ in range(100):
        ease.update(0.9)
    assert ease.value == 0.0


def test_orders_go_through_all_before_any_comes_again():
    given = np.concatenate(list(train.orders(10, 25, 5, np.random.default_rng(0))))
    assert len(given) == 25
    assert sorted(given[:10]) == sorted(given[10:20]) == list(range(10))
    assert list(train.orders(10, 0, 5, np.random.default_rng(0))) == []  # a stage may be left out


@pytest.mark.parametrize("processes", [1, 2])
def test_a_short_training_lowers_the_loss_and_writes_weights(processes, tmp_path, capfd, monkeypatch):
    """Eight canvases learned by heart, by one process and by two that share each batch."""
    monkeypatch.setattr(train, "SAY_EVERY", 1)
    recipe = train.Recipe(
        processes=processes,
        canvases=8,
        small_windows=8 * (20 if processes == 1 else 1),
        large_windows=8,
        whole_canvases=8,
        batch=8,
        warm_up=1e-6,
    )
    train.train(recipe, tmp_path / "weights.safetensors")
    written = load_file(tmp_path / "weights.safetensors")
    assert written.keys() == vit_digits().state_dict().keys()
    assert all(torch.isfinite(value).all() for value in written.values())
    if processes == 1:
        losses = [float(line.split("loss ")[1].split(",")[0]) for line in capfd.readouterr().out.splitlines()[1:]]
        assert len(losses) == 22
        assert losses[19] < 0.85 * losses[0]


def test_muon_takes_the_steps_of_torchs_own():
    """Both agree up to bfloat16's rounding, over steps with momentum and decay."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in ((30, 20), (20, 30), (30, 20))]
    own, theirs = ([torch.nn.Parameter(value.clone()) for value in start] for _ in range(2))
    optimisers = [
        train.Muon(own, 0.1, 0.05),
        torch.optim.Muon(theirs, lr=0.1, weight_decay=0.05, adjust_lr_fn="original"),
    ]
    for _ in range(3):
        for one, other in zip(own, theirs, strict=True):
            one.grad = torch.randn(one.shape, generator=generator)
            other.grad = one.grad.clone()
        for optimiser in optimisers:
            optimiser.step()
    for value, one, other in zip(start, own, theirs, strict=True):
        assert (one - value).norm() > 0.5
        assert (one - other).norm() < 0.02 * (one - value).norm()


def test_orthogonal_matrices_have_singular_values_near_one():
    matrices = torch.randn(4, 30, 20, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(train.orthogonal(matrices))
    assert values.min() > 0.6
    assert values.max() < 1.25


def test_the_rate_rises_over_the_warm_up_and_falls_to_nothing():
    assert train.rate_at(0.0, 0.02) == pytest.approx(0.01)
    assert train.rate_at(0.01, 0.02) == pytest.approx(0.51 * (0.5 + 0.5 * np.cos(0.01 * np.pi)))
    assert train.rate_at(0.5, 0.02) == pytest.approx(0.5)
    assert train.rate_at(1.0, 0.02) == pytest.approx(0.0)
    assert train.rate_at(0.0, 0.0) == 1.0  # none asked for


def test_one_process_leaves_gradients_as_they_are():
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.tensor([1.0, 2.0, 3.0])
    assert train.share_gradients([weight], torch.tensor(0.25)) == 0.25
    assert weight.grad.tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--out", "."], "--out . is a folder."),
        (["--out", "w", "--processes", "0"], "--processes 0 was asked for."),
        (["--out", "w", "--canvases", "0"], "--canvases 0 was asked for."),
        (["--out", "w", "--batch", "2", "--processes", "3"], "A --batch of 2 has no image for each of 3 processes."),
        (["--out", "w", "--small-windows", "0", "--large-windows", "0", "--whole-canvases", "63"], "No stage has the"),
    ],
)
def test_what_cannot_be_trained_is_a_bad_request_before_canvases_are_drawn(words, sentence, monkeypatch, capsys):
    monkeypatch.setattr(train, "Canvases", lambda count: pytest.fail("drew canvases all the same"))
    monkeypatch.setattr("sys.argv", ["train", *words])
    with pytest.raises(SystemExit) as ended:
        train.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {sentence}")
