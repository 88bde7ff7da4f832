"""The state that checkpoint benchmarks save, and every way of saving it, behind one interface.

The state is that of a small GPT in mixed-precision training: bf16 weights, and an optimizer that holds fp32 master
weights and moments, 14 bytes a parameter in 688 tensors. It trains, so the same object serves the training loop.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import disk
import narrowgauge as ng
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.nn import functional

LAYERS = 14
CONTEXT = 1024
HEAD = 64


class Linear(nn.Linear):
    """bf16 weights, fp32 arithmetic: a CPU without bf16 instructions is slower in bf16."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight.float(), self.bias.float())


class LayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return functional.layer_norm(x, self.normalized_shape, self.weight.float(), self.bias.float())


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln_1, self.qkv, self.proj = LayerNorm(width), Linear(width, 3 * width), Linear(width, width)
        self.ln_2, self.up, self.down = LayerNorm(width), Linear(width, 4 * width), Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.ln_1(x)).unflatten(-1, (3, -1, HEAD)).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(attended.transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.ln_2(x))))


class GPT(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.vocabulary = 65 * width  # GPT-2's proportion
        self.tokens, self.positions = nn.Embedding(self.vocabulary, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(LAYERS))
        self.ln = LayerNorm(width)
        nn.init.normal_(self.tokens.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """The loss of predicting each next token; tokens [batch, length]."""
        x = self.tokens(tokens).float() + self.positions.weight[: tokens.shape[1]].float()
        for block in self.blocks:
            x = block(x)
        logits = functional.linear(self.ln(x), self.tokens.weight.float())
        return functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


class MixedAdamW(torch.optim.Optimizer):
    """AdamW that keeps fp32 master weights beside bf16 parameters, as mixed-precision training does."""

    def __init__(self, parameters: Iterator[nn.Parameter], lr: float = 1e-4) -> None:
        super().__init__(parameters, {"lr": lr, "step": 0})
        for group in self.param_groups:
            for p in group["params"]:
                master = p.detach().float()
                self.state[p] = {  # as after many steps: zeros would be cheaper to write on some disks
                    "master": master,
                    "exp_avg": torch.randn_like(master) * 1e-4,
                    "exp_avg_sq": torch.rand_like(master) * 1e-8,
                }

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["step"] += 1
            first, second = 1 - 0.9 ** group["step"], 1 - 0.999 ** group["step"]
            for p in group["params"]:
                state, grad = self.state[p], p.grad.float()
                state["exp_avg"].lerp_(grad, 0.1)
                state["exp_avg_sq"].lerp_(grad * grad, 0.001)
                scale = state["exp_avg_sq"].sqrt().div_(math.sqrt(second)).add_(1e-8)
                state["master"].mul_(1 - group["lr"] * 0.01)
                state["master"].addcdiv_(state["exp_avg"], scale, value=-group["lr"] / first)
                p.copy_(state["master"])


class Payload:
    """A model and its optimizer of about `gigabytes` of state."""

    def __init__(self, gigabytes: float) -> None:
        torch.manual_seed(0)
        width = max(HEAD, round(math.sqrt(gigabytes * 1e9 / 14 / 235) / HEAD) * HEAD)
        self.model = GPT(width).bfloat16()
        self.optimizer = MixedAdamW(self.model.parameters())
        self.nbytes = sum(tensor.nbytes for tensor in self.tensors().values())

    def state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def tensors(self) -> dict[str, Tensor]:
        return flatten(self.state())


def flatten(state: Any, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of nested dicts and lists by dotted name."""
    if isinstance(state, Tensor):
        return {prefix.removesuffix("."): state}
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list | tuple) else ()
    found = {}
    for key, value in items:
        found |= flatten(value, f"{prefix}{key}.")
    return found


class Contender:
    """A way to save. save() returns when it is safe to compute on, wait() when the checkpoint is durable."""

    background = False  # whether anything is left to do while the caller computes

    def __init__(self, payload: Payload, directory: Path) -> None:
        self.payload, self.directory = payload, directory
        disk.empty(directory)
        self.state = payload.state()

    def save(self, step: int) -> None:
        raise NotImplementedError

    def wait(self) -> None:
        disk.fsync_all(self.directory)

    def load(self, step: int) -> Any:
        raise NotImplementedError

    def clear(self) -> None:
        """Removes what was saved."""
        for path in self.directory.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    def close(self) -> None:
        self.clear()


class Narrowgauge(Contender):
    mode = "snapshot"
    background = True

    def __init__(self, payload: Payload, directory: Path) -> None:
        super().__init__(payload, directory)
        self.checkpointer = ng.Checkpointer(directory, mode=self.mode)
        self.prepare()
        self.state = payload.state()

    def prepare(self) -> None:
        pass

    def save(self, step: int) -> None:
        self.checkpointer.save(step, self.state)

    def wait(self) -> None:
        self.checkpointer.wait()

    def load(self, step: int) -> Any:
        return ng.load_checkpoint(self.directory, step=step)

    def clear(self) -> None:
        for path in self.directory.glob("step-*"):
            shutil.rmtree(path)

    def close(self) -> None:
        self.checkpointer.close()
        self.clear()


class NarrowgaugeDeferred(Narrowgauge):
    mode = "deferred"

    def prepare(self) -> None:
        self.checkpointer.attach(self.payload.optimizer)


class NarrowgaugeAdopted(NarrowgaugeDeferred):
    """Changes its payload: the tensors move into page-aligned memory."""

    def prepare(self) -> None:
        self.checkpointer.adopt(self.payload.model, self.payload.optimizer)
        super().prepare()


class TorchSave(Contender):
    crc32 = True

    def save(self, step: int) -> None:
        before = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(self.crc32)
        try:
            torch.save(self.state, self.path(step))
        finally:
            torch.serialization.set_crc32_options(before)

    def load(self, step: int) -> Any:
        return torch.load(self.path(step), weights_only=True)

    def path(self, step: int) -> Path:
        return self.directory / f"{step}.pt"


class TorchSaveNoCrc(TorchSave):
    crc32 = False


class Safetensors(Contender):
    """Tensors only: the format has no place for the rest of the state."""

    def save(self, step: int) -> None:
        safetensors.torch.save_file(flatten(self.state), self.directory / f"{step}.safetensors")

    def load(self, step: int) -> Any:
        return safetensors.torch.load_file(self.directory / f"{step}.safetensors")


class Dcp(Contender):
    """torch.distributed.checkpoint as it comes: one rank; it syncs its files itself, though not their directory."""

    def save(self, step: int) -> None:
        dcp.save(self.state, checkpoint_id=self.directory / str(step), no_dist=True)

    def wait(self) -> None:
        pass

    def load(self, step: int) -> Any:
        """Into tensors that exist, the only way it has; made here, and so part of the time as it is for the others."""
        state = {name: torch.empty_like(tensor) for name, tensor in flatten(self.state).items()}
        dcp.load(state, checkpoint_id=self.directory / str(step), no_dist=True)
        return state


class DcpAsync(Dcp):
    background = True
    running: Future[Any] | None = None

    def save(self, step: int) -> None:
        self.wait()
        self.running = dcp.async_save(self.state, checkpoint_id=self.directory / str(step), no_dist=True)

    def wait(self) -> None:
        if self.running is not None:
            self.running.result()
            self.running = None


SNAPSHOT = "narrowgauge snapshot"
DEFERRED = "narrowgauge deferred"
ADOPTED = "narrowgauge deferred, adopted"
CONTENDERS: dict[str, type[Contender]] = {
    SNAPSHOT: Narrowgauge,
    DEFERRED: NarrowgaugeDeferred,
    ADOPTED: NarrowgaugeAdopted,
    "torch.save": TorchSave,
    "torch.save, no CRC": TorchSaveNoCrc,
    "safetensors": Safetensors,
    "DCP save": Dcp,
    "DCP async_save": DcpAsync,
}
