"""Pictures and arrays from a finished run's decoder: ``vaeq sample``."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vaeq.config import RunConfig, SampleConfig, config_hash, run_config
from vaeq.errors import InputError
from vaeq.experiment import build, prepare
from vaeq.generation.panel import Decoder
from vaeq.generation.samplers import as_uint8, decode_means, samplers
from vaeq.memory import networks
from vaeq.runs.record import (
    CHECKPOINT,
    RECORD,
    read_listed,
    read_record,
    require_writable,
    write_atomic,
)
from vaeq.seeds import derive_seed
from vaeq.training.checkpoint import load_checkpoint
from vaeq.training.ensemble import encode_all

# Digits side by side in interpolations.
_STEPS = 10
# And in reconstructions.
_ROW = 20


def sample(config: SampleConfig) -> list[Path]:
    """Draw what the config asks for; returns the PNG and the .npz that were written.

    The .npz holds ``images`` (n, height, width[, 3]) uint8 and, for samples, their codes ``z``.

    Raises:
        InputError: no finished run lies there, its data are others, the folder cannot be written.
    """
    assert config.run is not None
    directory = Path(config.run)
    decoder = load_decoder(directory)
    name, images, codes = _draw(config, decoder)
    output = Path(config.output) if config.output is not None else directory
    require_writable(output)
    rows = {"plane": math.isqrt(len(images)), "interpolations": _STEPS}
    columns = rows.get(config.picture, min(len(images), _ROW))
    if config.picture == "samples":
        columns = math.ceil(math.sqrt(len(images)))
    shown, packed = io.BytesIO(), io.BytesIO()
    pictures = decoder.images.unflatten(images).numpy()
    Image.fromarray(contact_sheet(pictures, columns)).save(shown, "PNG")
    arrays: dict[str, Any] = {"images": pictures, **codes}
    np.savez_compressed(packed, **arrays)
    paths = [output / f"{name}.png", output / f"{name}.npz"]
    for path, content in zip(paths, (shown, packed), strict=True):
        write_atomic(path, content.getvalue())
    return paths


def contact_sheet(images: np.ndarray, columns: int) -> np.ndarray:
    """Images (n, height, width[, 3]) in rows of so many, in a grey frame two pixels wide."""
    n, height, width, *colours = images.shape
    rows = math.ceil(n / columns)
    shape = (rows * (height + 2) + 2, columns * (width + 2) + 2, *colours)
    sheet = np.full(shape, 128, np.uint8)
    for i, image in enumerate(images):
        top, left = 2 + i // columns * (height + 2), 2 + i % columns * (width + 2)
        sheet[top : top + height, left : left + width] = image
    return sheet


def load_decoder(directory: Path) -> Decoder:
    """The decoder of a finished run, with the codes of its images.

    Raises:
        InputError: there is no finished run, its checkpoint is damaged, or its data are others.
    """
    try:
        record = read_record(directory / RECORD)
    except InputError as error:
        raise InputError(f"{directory} holds no finished run: record.json {error}") from None
    if record.state != "complete":
        raise InputError(f"{directory} holds a failed run; the same vaeq train tries it again.")
    config = run_config(record.config)
    if config.model == "ppca":
        raise InputError(f"{directory} is a ppca run; samples are drawn from model=mlp and conv.")
    # The record may be anybody's: it must not make this machine fetch files and write them.
    data_here = replace(config.data, download=False)
    config = replace(config, data=data_here, logger="none", kernels="torch")
    _, images = prepare(config)
    data = record.provenance.get("data")
    if not isinstance(data, dict) or images.md5 != data.get("md5"):
        raise InputError(f"data={config.data.name} is not what {directory} was trained on.")
    _require_weights(directory / CHECKPOINT, config, images.shape)
    state = build(config, images)
    try:
        read_listed(directory, CHECKPOINT, record.files)
    except FileNotFoundError:
        raise InputError(f"{directory} has no {CHECKPOINT}; train it again.") from None
    except OSError as error:
        raise InputError(f"{directory / CHECKPOINT} cannot be read: {error.strerror}.") from None
    load_checkpoint(directory, state, config_hash(config))
    if state.epoch == 0:
        raise InputError(f"{directory} has a checkpoint of no epoch; train it again.")
    codes, test_codes = (encode_all([state.vae], images.observed(p))[0] for p in ("train", "test"))
    return Decoder(state.vae.decode, codes, test_codes, images)


def _require_weights(checkpoint: Path, config: RunConfig, shape: tuple[int, ...]) -> None:
    """Refuse, before it is made, a network larger than its checkpoint: a record may ask for any."""
    weights = sum(network.weights for network in networks(config, shape))
    if not checkpoint.is_file():
        raise InputError(f"{checkpoint.parent} has no {checkpoint.name}; train it again.")
    if (size := checkpoint.stat().st_size) < 4 * weights:
        raise InputError(
            f"{checkpoint} holds {size} bytes, too few for the {weights} weights of its network; "
            "train it again."
        )


def _draw(config: SampleConfig, decoder: Decoder) -> tuple[str, Tensor, dict[str, np.ndarray]]:
    """Name, images (n, pixels) uint8 and codes of the picture asked for."""
    if config.picture == "plane":
        return "plane", decoder.plane(max(1, math.isqrt(config.n))), {}
    if config.picture == "interpolations":
        pairs = max(1, config.n // _STEPS)
        return "interpolations", decoder.interpolations(pairs, _STEPS), {}
    if config.picture == "reconstructions":
        # Row by row: originals, and under them what comes back.
        halves = (half.split(_ROW) for half in decoder.reconstructions(config.n))
        rows = [row for pair in zip(*halves, strict=True) for row in pair]
        return "reconstructions", torch.cat(rows), {}
    generator = torch.Generator(decoder.codes[0].device).manual_seed(
        derive_seed(config.seed, "sample", config.source)
    )
    ex_post = decoder.fit_ex_post(generator)
    z = samplers(decoder.posterior, ex_post, scale=config.scale)[config.source](config.n, generator)
    images = as_uint8(decode_means(decoder.decode, z.float()))
    return f"samples-{config.source}", images, {"z": z.cpu().numpy()}
