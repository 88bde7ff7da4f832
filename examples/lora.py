"""Fine-tuning over frozen narrow weights: gradients flow through narrowgauge.nn.Linear to low-rank adapters."""

import narrowgauge as ng
import torch


class Adapted(torch.nn.Module):
    """A frozen narrow layer plus a trainable product of two thin matrices."""

    def __init__(self, base: ng.nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.down = torch.nn.Linear(base.in_features, rank, bias=False)
        self.up = torch.nn.Linear(rank, base.out_features, bias=False)
        torch.nn.init.zeros_(self.up.weight)  # starts as the base alone

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 32))
ng.quantize_model(model, ng.int4)
for index in (0, 2):
    model[index].requires_grad_(False)
    model[index] = Adapted(model[index], rank=8)

x = torch.randn(128, 64)
target = torch.tanh(x @ torch.randn(64, 32) / 8)
trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
optimizer = torch.optim.Adam(trainable, lr=5e-3)
losses = []
for _ in range(100):
    loss = torch.nn.functional.mse_loss(model(x), target)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())

narrow = sum(module.packed.numel() for module in model.modules() if isinstance(module, ng.nn.Linear))
print(f"{narrow} bytes frozen, {sum(p.numel() for p in trainable)} parameters trained")
print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")
assert losses[-1] < losses[0] / 2
