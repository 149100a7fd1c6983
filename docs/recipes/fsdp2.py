"""FSDP2: parameters sharded over the processes, those of the average too.

torchrun --standalone --nproc-per-node 2 docs/recipes/fsdp2.py
"""

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import softlabels

gpu = torch.cuda.is_available()
dist.init_process_group("nccl" if gpu else "gloo")
device = torch.device("cuda", dist.get_node_local_rank()) if gpu else torch.device("cpu")
mesh = init_device_mesh(device.type, (dist.get_world_size(),))

torch.manual_seed(0)
images, digits = load_digits(return_X_y=True)
x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(digits)
train, test_x, test_y = TensorDataset(x[:1200], y[:1200]), x[1200:].to(device), y[1200:].to(device)
sampler = DistributedSampler(train, seed=0)
loader = DataLoader(train, batch_size=32, sampler=sampler)


def shard(module: nn.Module) -> None:
    for layer in module:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)


model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)).to(device)
shard(model)
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
# The averages are DTensors, as is criterion.state_dict(): save with torch.distributed.checkpoint.
averages = criterion.teacher.averages
whole = sum(tensor.full_tensor().numel() for tensor in averages.values())
here = sum(tensor.to_local().numel() for tensor in averages.values())
if dist.get_rank() == 0:
    print(f"{here} of {whole} parameters of the average in this process, accuracy {accuracy:.3f}")
dist.destroy_process_group()
