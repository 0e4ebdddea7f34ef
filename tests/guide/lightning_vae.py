"""A VAE in Lightning, and how its codes compare with N(0, I)."""

import lightning
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import vaeq
from vaeq.data.images import load_images


class VAE(lightning.LightningModule):
    def __init__(self, latent_dim):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 2 * latent_dim))
        self.decoder = nn.Sequential(nn.Linear(latent_dim, 200), nn.ReLU(), nn.Linear(200, 784))

    def training_step(self, batch, batch_idx):
        x, _ = batch
        mean, logvar = self.encoder(x).chunk(2, dim=1)
        z = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum()
        return functional.binary_cross_entropy_with_logits(self.decoder(z), x, reduction="sum") + kl

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)

    def predict_step(self, batch, batch_idx):
        x, label = batch
        return *self.encoder(x).chunk(2, dim=1), label


images = load_images(n_train=2000, n_test=500)
train_set = TensorDataset(images.train.float() / 255, images.train_labels)
test_set = TensorDataset(images.test.float() / 255, images.test_labels)
train_loader, test_loader = DataLoader(train_set, batch_size=100), DataLoader(test_set, 100)
model = VAE(latent_dim=2)
trainer = lightning.Trainer(
    max_epochs=10, accelerator="cpu", logger=False, enable_checkpointing=False
)
trainer.fit(model, train_loader)


# predict() evaluates predict_step, which returns mean, logvar and label of a batch.
def codes(loader):
    """Mean and log variance of q(z|x) of every image, and its label."""
    return [torch.cat(part) for part in zip(*trainer.predict(model, loader), strict=True)]


mean, logvar, labels = codes(train_loader)
test_mean, test_logvar, _ = codes(test_loader)
print(vaeq.measure(mean, logvar, test_mean, test_logvar, labels, panel="bracket"))
