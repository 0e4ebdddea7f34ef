"""A VAE of pythae's, and how its codes compare with N(0, I)."""

import tempfile

import torch
from pythae.models import VAE, VAEConfig
from pythae.pipelines import TrainingPipeline
from pythae.trainers import BaseTrainerConfig

import vaeq
from vaeq.data.images import load_images

images = load_images(n_train=2000, n_test=500)
train_data = images.train.view(-1, 1, 28, 28).float() / 255
test_data = images.test.view(-1, 1, 28, 28).float() / 255

model = VAE(VAEConfig(input_dim=(1, 28, 28), latent_dim=2))
with tempfile.TemporaryDirectory() as folder:
    settings = BaseTrainerConfig(output_dir=folder, num_epochs=10, learning_rate=1e-3, no_cuda=True)
    TrainingPipeline(training_config=settings, model=model)(train_data=train_data)

model.cpu().eval()  # pythae leaves it in training mode, and on the GPU


def codes(data):
    """Mean and log variance of q(z|x) of every image."""
    with torch.no_grad():
        batches = [model.encoder(x) for x in data.split(1000)]
    return torch.cat([b.embedding for b in batches]), torch.cat([b.log_covariance for b in batches])


print(vaeq.measure(*codes(train_data), *codes(test_data), panel="bracket"))
