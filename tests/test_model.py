"""The network: shapes, independence of encoder and decoder, initial variances."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vaeq.data.images import Images, mean_image
from vaeq.models.elbo import gaussian_kl, reconstruction
from vaeq.models.mlp import VAE, mlp
from vaeq.training.ensemble import encode_all


def build(**changes: object) -> VAE:
    settings: dict[str, object] = {
        "encoder_depth": 2,
        "encoder_width": 30,
        "decoder_depth": 1,
        "decoder_width": 20,
        "activation": "relu",
        "generator": torch.Generator().manual_seed(0),
    }
    return VAE(784, 3, **{**settings, **changes})  # type: ignore[arg-type]


def widths(network: nn.Sequential) -> list[int]:
    return [layer.out_features for layer in network if isinstance(layer, nn.Linear)]


def test_encoder_and_decoder_have_their_own_depth_and_width() -> None:
    vae = build(encoder_depth=3, encoder_width=40, decoder_depth=1, decoder_width=20)
    assert widths(vae.encoder) == [40, 40, 40, 6]
    assert widths(vae.decoder) == [20, 784]


def test_the_decoder_does_not_follow_the_encoder() -> None:
    assert widths(build(encoder_depth=5, encoder_width=99).decoder) == widths(build().decoder)


def test_depth_zero_is_linear(small: Images) -> None:
    vae = build(encoder_depth=0, decoder_depth=0)
    assert widths(vae.encoder) == [6]
    assert widths(vae.decoder) == [784]
    x = small.train[:2].float() / 255
    means = [vae.encode(v)[0] for v in (x[:1], x[1:], 0.5 * (x[:1] + x[1:]))]
    torch.testing.assert_close(means[2], 0.5 * (means[0] + means[1]))


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_initial_variances_are_he_or_glorot(activation: str) -> None:
    network = mlp([1000, 800, 600], activation, torch.Generator().manual_seed(1))
    first, last = network[0], network[-1]
    assert isinstance(first, nn.Linear)
    assert isinstance(last, nn.Linear)
    expected = 2 / 1000 if activation == "relu" else 2 / (1000 + 800)
    # The variance of n normal draws has relative standard error sqrt(2/n).
    for weight, variance in ((first.weight, expected), (last.weight, 2 / (800 + 600))):
        assert weight.var().item() == pytest.approx(variance, rel=4 * (2 / weight.numel()) ** 0.5)
    assert not first.bias.any()


def test_torch_initialization_is_that_of_linear_layers() -> None:
    network = mlp([1000, 800], "relu", torch.Generator().manual_seed(1), "torch")
    layer = network[0]
    assert isinstance(layer, nn.Linear)
    for parameter, count in ((layer.weight, 800_000), (layer.bias, 800)):
        assert parameter.abs().max() <= 1000**-0.5
        # A uniform variable on ±b has variance b²/3, and its square a relative sd of 2/√5.
        tolerance = 4 * 2 / 5**0.5 / count**0.5
        assert parameter.square().mean().item() == pytest.approx(1 / 3000, rel=tolerance)


def test_the_heads_start_as_two_glorot_layers() -> None:
    vae = VAE(
        784,
        50,
        encoder_depth=1,
        encoder_width=400,
        decoder_depth=0,
        decoder_width=1,
        activation="relu",
        generator=torch.Generator().manual_seed(0),
    )
    head = vae.encoder[-1]
    assert isinstance(head, nn.Linear)
    tolerance = 4 * (2 / head.weight.numel()) ** 0.5
    assert head.weight.var().item() == pytest.approx(2 / (400 + 50), rel=tolerance)


def test_mean_image_starts_near_the_model_without_a_code(small: Images) -> None:
    vae = build(initialization="mean_image")
    mean = mean_image(small.train)
    vae.start_at(mean)
    x = small.train.float() / 255
    noise = torch.randn(len(x), 3, generator=torch.Generator().manual_seed(2))
    logits, mu, logvar = vae(x, noise)
    # Its ELBO: the log-likelihood of independent pixels of these means, some 205 nats below 0.
    without_code = torch.logit(mean).expand_as(x)
    expected = reconstruction(without_code, x).mean().item()
    found = (reconstruction(logits, x) - gaussian_kl(mu, logvar)).mean().item()
    assert found == pytest.approx(expected, rel=0.02)
    plain, other_mu, other_logvar = build()(x, noise)
    assert (reconstruction(plain, x) - gaussian_kl(other_mu, other_logvar)).mean() < 2 * expected


def test_forward_is_encode_sample_decode(small: Images) -> None:
    vae = build()
    x = small.train[:8].float() / 255
    noise = torch.randn(8, 3, generator=torch.Generator().manual_seed(2))
    logits, mean, logvar = vae(x, noise)
    torch.testing.assert_close(logits, vae.decode(mean + (0.5 * logvar).exp() * noise))
    assert logits.shape == (8, 784)
    assert mean.shape == logvar.shape == (8, 3)


def test_encode_all_does_not_depend_on_the_batch(small: Images) -> None:
    vae = build()
    (whole,) = encode_all([vae], small.train)
    (parts,) = encode_all([vae], small.train, batch_size=77)
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b)
    assert whole[0].shape == (600, 3)
    assert not whole[0].requires_grad


def test_codes_of_any_precision_are_decoded() -> None:
    # The samples of very narrow posteriors are float64.
    vae = build()
    z = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(vae.decode(z), vae.decode(z.float()))
