"""What a run is made of before it begins: images, a model with its first weights, a recipe."""

from __future__ import annotations

from dataclasses import asdict, fields
from functools import lru_cache
from typing import Any

import torch

from vaeq import lockstep
from vaeq.config import DataConfig, RunConfig
from vaeq.data.images import Images, load_images, mean_image
from vaeq.hardware import free_memory, resolve_device, resolve_precision
from vaeq.memory import TOGETHER, needed, require_memory
from vaeq.models.conv import ConvVAE, require_depth
from vaeq.models.mlp import VAE
from vaeq.seeds import derive_seed
from vaeq.trackers import require
from vaeq.training.kernels import resolve_kernels
from vaeq.training.loop import Recipe, State


@lru_cache(maxsize=1)
def _images(data: DataConfig, device: torch.device) -> Images:
    # A worker's next run mostly wants the images of its last one.
    return load_images(**asdict(data)).to(device)


def prepare(config: RunConfig, members: int = 1) -> tuple[str, Images]:
    """What a run needs from outside: its precision, and its images on its device; its tracker.

    Args:
        members: of the program it trains in, of which the run is the largest.

    Raises:
        InputError: before anything is written; also where it would need more memory than is free.
    """
    require(config)
    device = resolve_device(config.device)
    precision = resolve_precision(config.precision, device)
    step_kernels(config, device)
    images = _images(config.data, device)
    if config.model == "conv":
        require_depth(images.shape, config.encoder_depth, config.decoder_depth)
    if config.model != "ppca":
        n = {"n_train": len(images.train), "n_test": len(images.test)}
        at_once = measured_at_once(config, device)
        need = needed(config, members=members, at_once=at_once, shape=images.shape, **n)
        require_memory(need, *free_memory(device), config)
    return precision, images


def measured_at_once(config: RunConfig, device: torch.device) -> int:
    """How many runs like this one are measured side by side."""
    if config.measure.flow:
        # The flow takes its first weights from torch's own generator, of which a process has one.
        return 1
    return TOGETHER if lockstep.stacks_pay(device) else torch.get_num_threads()


def step_kernels(config: RunConfig, device: torch.device) -> str:
    """What takes the steps: ``compiled`` or ``torch``, which other models than mlp have.

    Raises:
        InputError: compiled ones were asked for, and cannot be had.
    """
    return resolve_kernels(config.kernels, device) if config.model == "mlp" else "torch"


def build(config: RunConfig, images: Images) -> State:
    """A model with its initial weights, untrained, on the device of the images."""
    names = ("encoder_depth", "encoder_width", "decoder_depth", "decoder_width", "activation")
    network: dict[str, Any] = {name: getattr(config, name) for name in names}
    network["initialization"] = config.initialization
    network["generator"] = torch.Generator().manual_seed(derive_seed(config.seed, "weights"))
    if config.model == "conv":
        vae: VAE = ConvVAE(images.shape, config.latent_dim, **network)
    else:
        vae = VAE(images.pixels, config.latent_dim, **network)
    if config.initialization == "mean_image":
        vae.start_at(mean_image(images.train))
    return State(vae.to(images.train.device))


def recipe(config: RunConfig) -> Recipe:
    """The settings of a config that training itself takes."""
    return Recipe(**{item.name: getattr(config, item.name) for item in fields(Recipe)})
