"""The loops people start from: the textbook VAE, a plain tensor loop, and pythae's trainer."""

from __future__ import annotations

import io
import logging
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import to_tensor


class DigitFiles(Dataset[tuple[Tensor, int]]):
    """Images as torchvision's MNIST hands them out: one PIL image at a time through ToTensor."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images.view(-1, 28, 28), labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        image = Image.fromarray(self.images[index].numpy())
        return to_tensor(image), int(self.labels[index])


class TextbookVAE(nn.Module):
    """784-400-20-400-784 with two heads, as in the examples of PyTorch."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(784, 400)
        self.mean = nn.Linear(400, 20)
        self.logvar = nn.Linear(400, 20)
        self.from_code = nn.Linear(20, 400)
        self.to_image = nn.Linear(400, 784)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = torch.relu(self.hidden(x.view(-1, 784)))
        mean, logvar = self.mean(h), self.logvar(h)
        z = mean + torch.exp(0.5 * logvar) * torch.randn_like(logvar)
        return torch.sigmoid(self.to_image(torch.relu(self.from_code(z)))), mean, logvar


def textbook_loss(image: Tensor, x: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    """The negative ELBO, summed over the batch."""
    bce = functional.binary_cross_entropy(image, x.view(-1, 784), reduction="sum")
    return bce - 0.5 * torch.sum(1 + logvar - mean.pow(2) - logvar.exp())


def textbook(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], epochs: int, seed: int
) -> tuple[float, float]:
    """Seconds and held-out negative ELBO of the textbook example, its test passes included."""
    torch.manual_seed(seed)
    began = time.perf_counter()
    loader = DataLoader(DigitFiles(*train), batch_size=128, shuffle=True)
    test_loader = DataLoader(DigitFiles(*test), batch_size=128)
    model = TextbookVAE()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    held_out = float("nan")
    for _ in range(epochs):
        model.train()
        train_loss = 0.0
        for x, _ in loader:
            optimizer.zero_grad()
            loss = textbook_loss(*(out := model(x))[:1], x, *out[1:])
            loss.backward()
            train_loss += loss.item()
            optimizer.step()
        model.eval()
        test_loss = 0.0
        with torch.no_grad():
            for x, _ in test_loader:
                image, mean, logvar = model(x)
                test_loss += textbook_loss(image, x, mean, logvar).item()
        held_out = test_loss / len(test[0])
    return time.perf_counter() - began, held_out


def mlp(sizes: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def tensor_loop(images: Tensor, hidden: list[int], latent_dim: int) -> float:
    """Seconds of an epoch of autograd over images kept as one float tensor and sliced."""
    encoder = mlp([784, *hidden, 2 * latent_dim])
    decoder = mlp([latent_dim, *reversed(hidden), 784])
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=1e-3)
    x_all = images.float() / 255
    began = time.perf_counter()
    order = torch.randperm(len(x_all))
    for index in order.split(128):
        x = x_all[index]
        mean, logvar = encoder(x).chunk(2, 1)
        z = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
        bce = functional.binary_cross_entropy_with_logits(decoder(z), x, reduction="sum")
        loss = bce - 0.5 * torch.sum(1 + logvar - mean.pow(2) - logvar.exp())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return time.perf_counter() - began


def matmul_floor(images: int, hidden: list[int], latent_dim: int) -> float:
    """Seconds of the float32 matrix products of an epoch, and of nothing else.

    Forward, weight gradients and input gradients of every layer, but for the images' own.
    """
    products: list[Callable[[], Tensor]] = []
    networks = [784, *hidden, 2 * latent_dim], [latent_dim, *reversed(hidden), 784]
    for network in networks:
        for i, (fan_in, fan_out) in enumerate(pairwise(network)):
            x, grad = torch.randn(128, fan_in), torch.randn(128, fan_out)
            weight = torch.randn(fan_out, fan_in)
            products.append(lambda x=x, weight=weight: torch.mm(x, weight.T))
            products.append(lambda x=x, grad=grad: torch.mm(grad.T, x))
            if network is networks[1] or i > 0:
                products.append(lambda weight=weight, grad=grad: torch.mm(grad, weight))
    for product in products:
        product()
    steps = images / 128
    counted = max(1, round(steps / 4))
    began = time.perf_counter()
    for _ in range(counted):
        for product in products:
            product()
    return (time.perf_counter() - began) * steps / counted


def pythae_epoch(images: Tensor, hidden: list[int], latent_dim: int) -> float:
    """Seconds of an epoch of pythae's trainer.

    Raises:
        ImportError: pythae, an optional dependency of the benchmarks, is not installed.
    """
    from pythae.data.datasets import BaseDataset
    from pythae.models import VAE, VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder
    from pythae.trainers import BaseTrainer, BaseTrainerConfig

    logging.disable(logging.WARNING)  # its loggers set a level each, with a handler each

    class Encoder(BaseEncoder):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp([784, *hidden, 2 * latent_dim])

        def forward(self, x: Tensor) -> ModelOutput:
            mean, logvar = self.net(x.reshape(len(x), -1)).chunk(2, 1)
            return ModelOutput(embedding=mean, log_covariance=logvar)

    class Decoder(BaseDecoder):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp([latent_dim, *reversed(hidden), 784])

        def forward(self, z: Tensor) -> ModelOutput:
            return ModelOutput(reconstruction=torch.sigmoid(self.net(z)).view(-1, 1, 28, 28))

    settings = VAEConfig(input_dim=(1, 28, 28), latent_dim=latent_dim, reconstruction_loss="bce")
    model = VAE(settings, encoder=Encoder(), decoder=Decoder())
    data = BaseDataset(images.view(-1, 1, 28, 28).float() / 255, torch.zeros(len(images)))
    said = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(said), redirect_stderr(said):
        trainer = BaseTrainer(
            model=model,
            train_dataset=data,
            training_config=BaseTrainerConfig(
                output_dir=str(Path(folder)),
                num_epochs=1,
                per_device_train_batch_size=128,
                learning_rate=1e-3,
                no_cuda=True,
            ),
        )
        trainer.prepare_training()
        began = time.perf_counter()
        trainer.train_step(epoch=1)
        return time.perf_counter() - began
