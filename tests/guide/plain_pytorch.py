"""A VAE in plain PyTorch, and how its codes compare with N(0, I)."""

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import vaeq
from vaeq.data.images import load_images


class Encoder(nn.Module):
    def __init__(self, latent_dim):
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(784, 200), nn.ReLU())
        self.mean, self.logvar = nn.Linear(200, latent_dim), nn.Linear(200, latent_dim)

    def forward(self, x):
        h = self.hidden(x)
        return self.mean(h), self.logvar(h)


images = load_images(n_train=2000, n_test=500)
train_set = TensorDataset(images.train.float() / 255, images.train_labels)
test_set = TensorDataset(images.test.float() / 255, images.test_labels)
train_loader, test_loader = DataLoader(train_set, batch_size=100), DataLoader(test_set, 100)

encoder = Encoder(latent_dim=2)
decoder = nn.Sequential(nn.Linear(2, 200), nn.ReLU(), nn.Linear(200, 784))
optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=1e-3)
for _ in range(10):
    for x, _ in train_loader:
        mean, logvar = encoder(x)
        z = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum()
        loss = functional.binary_cross_entropy_with_logits(decoder(z), x, reduction="sum") + kl
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

encoder.eval()  # else batch normalisation mixes the images


def codes(loader):
    """Mean and log variance of q(z|x) of every image, and its label."""
    with torch.no_grad():
        batches = [(*encoder(x), label) for x, label in loader]
    return [torch.cat(part) for part in zip(*batches, strict=True)]


mean, logvar, labels = codes(train_loader)
test_mean, test_logvar, _ = codes(test_loader)
print(vaeq.measure(mean, logvar, test_mean, test_logvar, labels, panel="bracket"))
