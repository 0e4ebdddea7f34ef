"""The convolutional VAE: shapes of every image, the starting weights, what its keys mean."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from vaeq.errors import InputError
from vaeq.models.conv import ConvVAE, require_depth


def conv(shape: tuple[int, ...] = (28, 28), seed: int = 0, **changes: Any) -> ConvVAE:
    network: dict[str, Any] = {
        "latent_dim": 3,
        "encoder_depth": 2,
        "encoder_width": 64,
        "decoder_depth": 2,
        "decoder_width": 32,
        "activation": "relu",
        "initialization": "he_glorot",
    }
    generator = torch.Generator().manual_seed(seed)
    return ConvVAE(shape, generator=generator, **{**network, **changes})


@pytest.mark.parametrize(
    ("shape", "depths"),
    [
        ((28, 28), (4, 3)),
        ((7, 5), (1, 2)),
        ((2, 9), (1, 1)),
        ((32, 32, 3), (5, 2)),
        ((13, 27, 3), (3, 3)),
    ],
)
def test_images_of_every_size_go_in_and_come_out(
    shape: tuple[int, ...], depths: tuple[int, int]
) -> None:
    vae = conv(shape, encoder_depth=depths[0], decoder_depth=depths[1])
    pixels = torch.Size(shape).numel()
    x = torch.rand(4, pixels)
    logits, mean, logvar = vae(x, torch.randn(4, 3))
    assert logits.shape == (4, pixels)
    assert mean.shape == logvar.shape == (4, 3)


def test_depth_counts_convolutions_and_width_sets_all_channels() -> None:
    shapes = {name: tuple(p.shape) for name, p in conv().named_parameters() if "weight" in name}
    assert list(shapes.values()) == [
        (4, 1, 4, 4),  # 64/16 channels, then twice as many
        (8, 4, 4, 4),
        (64, 8 * 7 * 7),
        (6, 64),
        (32, 3),
        (4 * 7 * 7, 32),
        (4, 2, 4, 4),
        (2, 1, 4, 4),
    ]


def test_a_pixel_of_the_code_is_a_pixel_of_the_picture() -> None:
    # One convolution looks at 4 x 4 pixels: a change in a corner is seen in that corner alone.
    vae = conv((8, 6, 3), encoder_depth=1, decoder_depth=1)
    x = torch.zeros(1, 8, 6, 3)
    base = vae.encoder[:2](x.flatten(1))
    x[0, 7, 5, 2] = 1
    changed = (vae.encoder[:2](x.flatten(1)) != base).any(1)[0].nonzero()
    assert changed.tolist() == [[3, 2]]
    with torch.no_grad():
        features = torch.zeros(1, 2, 4, 3)
        base = vae.decoder[5:](features)
        features[0, :, 0, 2] = 1
        moved = (vae.decoder[5:](features) != base).view(8, 6, 3).any(2).nonzero()
    # Its kernel of 4 x 4 begins one pixel outside of the upper right corner.
    assert moved.min(0).values.tolist() == [0, 3]
    assert moved.max(0).values.tolist() == [2, 5]


def test_he_and_glorot_keep_the_size_of_the_signal() -> None:
    vae = conv((32, 32), encoder_width=512, decoder_width=512, latent_dim=8)
    generator = torch.Generator().manual_seed(1)
    vae.requires_grad_(False)
    h = torch.randn(64, 1024, generator=generator)
    for layer in vae.encoder:
        h = layer(h)
        if isinstance(layer, nn.Conv2d | nn.Linear) and layer is not vae.encoder[-1]:
            # From unit variance He's layers come out at a mean square of 2, whatever came before.
            # Padding takes from it at the borders.
            assert 1.2 < float(h.square().mean()) < 2.8, layer
    h = torch.randn(64, 8, generator=generator)
    for layer in vae.decoder:
        h = layer(h)
        if isinstance(layer, nn.ConvTranspose2d | nn.Linear) and layer is not vae.decoder[-2]:
            assert 1.2 < float(h.square().mean()) < 2.8, layer


def test_torch_initialization_has_the_bounds_of_torchs_own() -> None:
    layers = [m for m in conv(initialization="torch").modules() if hasattr(m, "weight")]
    own = [m for m in conv(seed=1).modules() if hasattr(m, "weight")]
    assert len(layers) == 8
    for layer, other in zip(layers, own, strict=True):
        other.reset_parameters()
        size = layer.weight.numel()
        for found, theirs in ((layer.weight, other.weight), (layer.bias, other.bias)):
            largest = float(theirs.detach().abs().max())
            if found.numel() > 100:
                # Maxima of many uniform draws on the same interval.
                assert float(found.detach().abs().max()) == pytest.approx(largest, rel=0.1)
        bound = 1 / layer.weight[0].numel() ** 0.5
        assert float(layer.weight.detach().abs().max()) <= bound, size
        assert float(other.weight.detach().abs().max()) <= bound


def test_the_weights_are_the_generators() -> None:
    same, again, other = (
        torch.cat([p.flatten() for p in conv(seed=seed).parameters()]) for seed in (0, 0, 1)
    )
    assert torch.equal(same, again)
    assert not torch.equal(same, other)


@pytest.mark.parametrize(
    ("depths", "sentence"),
    [
        ((0, 1), "encoder_depth must be between 1 and 4, how often images of 28 x 28 can be"),
        ((1, 5), "decoder_depth must be between 1 and 4, .* with model=conv, got 5"),
    ],
)
def test_images_can_be_halved_so_often(depths: tuple[int, int], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        require_depth((28, 28), *depths)
    with pytest.raises(InputError, match=sentence):
        conv(encoder_depth=depths[0], decoder_depth=depths[1])
