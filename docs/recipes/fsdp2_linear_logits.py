"""FSDP2 with LinearLogits: the last layer belongs to the outermost fully_shard, which keeps it until the backward pass.

torchrun --standalone --nproc-per-node 2 docs/recipes/fsdp2_linear_logits.py
"""

import warnings

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import softlabels

warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # of its last layer; nothing writes to it
gpu = torch.cuda.is_available()
dist.init_process_group("nccl" if gpu else "gloo")
device = torch.device("cuda", dist.get_node_local_rank()) if gpu else torch.device("cpu")
mesh = init_device_mesh(device.type, (dist.get_world_size(),))

torch.manual_seed(0)
images, digits = load_digits(return_X_y=True)
x, y = torch.tensor(images / 16, dtype=torch.float32, device=device), torch.tensor(digits, device=device)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(64, 128), nn.ReLU()), nn.Linear(128, 10)

    def forward(self, inputs):
        return softlabels.LinearLogits(self.body(inputs), self.head.weight, self.head.bias)


model = Model().to(device)
fully_shard(model.body, mesh=mesh)
fully_shard(model, mesh=mesh)  # the head is a part of this one
criterion = softlabels.BetaSmoothingLoss(label_smoothing=0.05).attach(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

for epoch in range(6):
    order = torch.randperm(1200, generator=torch.Generator().manual_seed(epoch)).to(device)
    for rows in order[dist.get_rank() :: dist.get_world_size()].split(32):
        loss = criterion(model(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

model.eval()
with torch.no_grad():
    accuracy = (model(x[1200:]).dense().argmax(1) == y[1200:]).double().mean()
assert criterion.teacher.num_updates == 6 * len(range(0, 1200 // dist.get_world_size(), 32))
if dist.get_rank() == 0:
    print(f"accuracy {accuracy:.3f}")
dist.destroy_process_group()
