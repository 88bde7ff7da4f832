"""Training that may be killed at any moment and resumes bit for bit.

python examples/resume.py run 20        # trains 20 steps, saving each; run again to go on from the newest
"""

import sys
import tempfile

import narrowgauge as ng
import torch

directory = sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 20
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Dropout(), torch.nn.Linear(64, 1))
optimizer = torch.optim.AdamW(model.parameters())

with ng.Checkpointer(directory, keep=2) as checkpointer:
    start = 0
    if ng.checkpoint.steps(directory):
        state = ng.load_checkpoint(directory)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        start = state["step"]
    for step in range(start + 1, steps + 1):
        optimizer.zero_grad()
        loss = model(torch.randn(8, 32)).square().mean()
        loss.backward()
        optimizer.step()
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}
        checkpointer.save(step, {**state, "step": step})
        print(step, loss.item().hex(), flush=True)
