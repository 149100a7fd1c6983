"""Several processes, one replica each.

torchrun --standalone --nproc-per-node 2 docs/recipes/ddp.py
"""

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import softlabels

gpu = torch.cuda.is_available()
dist.init_process_group("nccl" if gpu else "gloo")
device = torch.device("cuda", dist.get_node_local_rank()) if gpu else torch.device("cpu")

torch.manual_seed(0)
images, digits = load_digits(return_X_y=True)
x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(digits)
train, test_x, test_y = TensorDataset(x[:1200], y[:1200]), x[1200:].to(device), y[1200:].to(device)
sampler = DistributedSampler(train, seed=0)
loader = DataLoader(train, batch_size=32, sampler=sampler)

model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)).to(device)
model = DistributedDataParallel(model)
# Each process ranks the rows of its own batch, and keeps the same average as the others without communication.
# global_ranking=True would rank the rows of all processes together, at the price of waiting for each other.
criterion = softlabels.BetaSmoothingLoss(label_smoothing=0.05).attach(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

for epoch in range(6):
    sampler.set_epoch(epoch)
    for inputs, labels in loader:
        loss = criterion(model(inputs.to(device)), labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

model.eval()
with torch.no_grad():
    accuracy = (model(test_x).argmax(1) == test_y).double().mean()
if dist.get_rank() == 0:
    # To save: model.module.state_dict() and criterion.state_dict(), which holds the average. One process is enough.
    print(f"{dist.get_world_size()} processes, accuracy {accuracy:.3f}")
dist.destroy_process_group()
