"""What the decoder makes of codes: likelihood of held-out images, worth of samples, pictures.

The place where the mismatch between q(z) and N(0, I) is paid for: log p(x) under either prior, and
samples decoded from either.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vaeq.data.images import Images
from vaeq.divergence.ex_post import ExPost, fit_ex_post
from vaeq.errors import InputError
from vaeq.estimate import Estimate
from vaeq.generation.classifier import load_classifier
from vaeq.generation.likelihood import ais_check_together, log_likelihood_together
from vaeq.generation.quality import FLOOR, missing_quality, sample_quality
from vaeq.generation.samplers import (
    as_uint8,
    decode_means,
    interpolations,
    latent_plane,
    samplers,
)
from vaeq.posterior.aggregated import AggregatedPosterior

# Of every kind of picture, enough to see and few enough to keep with a thousand runs.
SHOWN = 64
RECONSTRUCTED = 20
PAIRS, STEPS = 6, 10
PLANE_SIDE = 20

# The estimates of likelihoods and of Decoder.annealed.
LIKELIHOOD = (
    "log_likelihood",
    "inference_gap",
    "prior_cost",
    "log_likelihood_ex_post",
    "importance_ess",
)
ANNEALED = ("ais_log_likelihood", "importance_log_likelihood", "ais_gap")

Codes = tuple[Tensor, Tensor]
Decode = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Decoder:
    """A trained decoder with the codes and the images it belongs to.

    Args:
        decode: codes (B, D) → Bernoulli logits (B, pixels).
        codes, test_codes: mean and logvar of q(z|x) for the training and the held-out images.
    """

    decode: Decode
    codes: Codes
    test_codes: Codes
    images: Images

    @cached_property
    def posterior(self) -> AggregatedPosterior:
        """q_N of the training images."""
        return AggregatedPosterior(*self.codes)

    def fit_ex_post(self, generator: torch.Generator) -> ExPost:
        """The mixture that stands in for N(0, I), fitted to training codes alone."""
        return fit_ex_post(self.posterior, generator)

    def likelihood(
        self, ex_post: ExPost, generator: torch.Generator, *, n_importance: int, n_images: int
    ) -> dict[str, Estimate]:
        """log p(x), inference gap and prior cost of the first held-out images."""
        (found,) = likelihoods(
            [self],
            lambda z: self.decode(z[0])[None],
            [ex_post],
            [generator],
            n_importance=n_importance,
            n_images=n_images,
        )
        return found

    def annealed(self, generator: torch.Generator, n_images: int) -> dict[str, Estimate]:
        """What importance sampling misses, by annealing."""
        (found,) = annealed(
            [self], lambda z: self.decode(z[0])[None], [generator], n_images=n_images
        )
        return found

    def quality(
        self, ex_post: ExPost, generator: torch.Generator, cache: Path
    ) -> tuple[dict[str, Estimate], dict[str, Any]]:
        """Samples of every source in the features of a classifier kept in ``cache``.

        Against grey levels, also where the encoder sees binary pixels: samples are grey levels.
        Returns the estimates, and which classifier it was: distances compare under one alone. They
        are missing, with the reason, for images that it was not made for.
        """
        images = self.images
        train, test = images.train, images.test
        sources = samplers(self.posterior, ex_post)
        reason = _no_classifier(images)
        if reason is None:
            assert images.train_labels is not None
            assert images.test_labels is not None
            labels = images.train_labels, images.test_labels
            try:
                classifier = load_classifier(
                    cache, train, labels[0], test, labels[1], data_md5=images.md5
                )
            except InputError as error:
                reason = str(error)
        if reason is not None:
            return missing_quality([*sources, FLOOR], reason), {}
        found = sample_quality(self.decode, sources, train, test, classifier, generator)
        return found, {"accuracy": classifier.accuracy, "checksum": classifier.checksum}

    def pictures(self, ex_post: ExPost, generator: torch.Generator) -> dict[str, Tensor]:
        """Small sets of uint8 images (n, height, width) or (n, height, width, 3) by name."""
        flat = {
            name: as_uint8(decode_means(self.decode, sampler(SHOWN, generator)))
            for name, sampler in samplers(self.posterior, ex_post).items()
        }
        flat["originals"], flat["reconstructions"] = self.reconstructions(RECONSTRUCTED)
        flat["interpolations"] = self.interpolations(PAIRS, STEPS)
        if self.codes[0].shape[1] == 2:
            flat["plane"] = self.plane(PLANE_SIDE)
        return {name: self.images.unflatten(images) for name, images in flat.items()}

    def reconstructions(self, count: int) -> tuple[Tensor, Tensor]:
        """The first held-out images, and what comes back from the means of their codes."""
        originals = self.images.observed("test")[:count]
        return originals, as_uint8(decode_means(self.decode, self.test_codes[0][:count]))

    def interpolations(self, pairs: int, steps: int) -> Tensor:
        """Between the codes of one held-out digit and the next."""
        mean = self.test_codes[0]
        pairs = min(pairs, len(mean) // 2)
        return as_uint8(
            interpolations(self.decode, mean[: 2 * pairs].unflatten(0, (pairs, 2)), steps)
        )

    def plane(self, side: int) -> Tensor:
        """The manifold of a two-dimensional code."""
        mean = self.codes[0]
        return as_uint8(latent_plane(self.decode, mean.shape[1], side, device=mean.device))


def likelihoods(
    decoders: Sequence[Decoder],
    decode: Decode,
    ex_posts: Sequence[ExPost],
    generators: Sequence[torch.Generator],
    *,
    n_importance: int,
    n_images: int,
) -> list[dict[str, Estimate]]:
    """log p(x), inference gap and prior cost of the first held-out images, as one program.

    Args:
        decoders: of the same images.
        decode: all of them at once, codes (E, B, D) → Bernoulli logits (E, B, pixels).
        ex_posts, generators: one a decoder.
    """
    part = slice(n_images)
    return log_likelihood_together(
        decode,
        [decoder.test_codes[0][part] for decoder in decoders],
        [decoder.test_codes[1][part] for decoder in decoders],
        decoders[0].images.observed("test")[part],
        generators,
        n_importance=n_importance,
        log_priors=[ex_post.density.log_prob for ex_post in ex_posts],
    )


def annealed(
    decoders: Sequence[Decoder],
    decode: Decode,
    generators: Sequence[torch.Generator],
    *,
    n_images: int,
) -> list[dict[str, Estimate]]:
    """What importance sampling misses of the first held-out images, as one program.

    Args:
        decoders: of the same images.
        decode: all of them at once, codes (E, B, D) → Bernoulli logits (E, B, pixels).
        generators: one a decoder.
    """
    return ais_check_together(
        decode,
        [decoder.test_codes[0] for decoder in decoders],
        [decoder.test_codes[1] for decoder in decoders],
        decoders[0].images.observed("test"),
        generators,
        n_images=n_images,
    )


def _no_classifier(images: Images) -> str | None:
    """Why no digit classifier can be trained on these images; None where one can."""
    if images.shape != (28, 28):
        size = " x ".join(map(str, images.shape))
        return f"the classifier takes grey images of 28 x 28 pixels, and these are {size}"
    for name, labels in (("training", images.train_labels), ("held-out", images.test_labels)):
        if labels is None:
            return f"the {name} images have no labels to train a classifier with"
        if not 0 <= int(labels.min()) <= int(labels.max()) <= 9:
            return "the classifier tells ten classes, 0 to 9, apart, and the labels have others"
    return None
