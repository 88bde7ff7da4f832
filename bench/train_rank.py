"""A rank of bench/train.py: trains a GPT of 5.7 million parameters under FSDP2 by every contender.

train_rank.py loss JOBS STEPS      JOBS: JSON [[contender, seed], ..]; a line of JSON from rank 0 for every step
train_rank.py step CONTENDERS ROUNDS NODE_SIZE      JSON [contender, ..]; a line for every round

The text is that of pydoc_data.topics, byte by byte; its last tenth is held out.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import narrowgauge as ng
import torch
import torch.distributed as dist
import torch.nn.functional as F
from collectives_rank import cpu_seconds, sent_bytes
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter

WIDTH, LAYERS, HEADS, LENGTH, VOCABULARY = 256, 7, 4, 64, 256
SEQUENCES = 2  # of a rank and step
WARM_UP = 20  # steps until the learning rate is full
INT8, INT4 = "int8:g64:bf16", "int4:g64:bf16"


class Contender(NamedTuple):
    """weights and gradients as ng.fsdp.apply takes them; None: torch's own; "bf16": see Bf16Gather.

    keeps: the backward pass does not ask other nodes for weights (hpZ of ZeRO++): nodes of several ranks have secondary
    shards, in nodes of one a rank keeps what the forward pass gathered.
    """

    weights: Any = None
    gradients: Any = None
    keeps: bool = False


CONTENDERS = {
    "fp32": Contender(),
    "bf16": Contender("bf16", "bf16"),
    "int8": Contender(INT8, INT8),
    # qwZ with the largest group there is (of ZeRO++'s own some thousand), qgZ with rows of 256, fp32 scales.
    "zero++": Contender("int8:g1024:fp32", ("int4:g256:fp32", "int4:g256:fp32"), keeps=True),
    "ours": Contender(INT8, (INT8, ng.Wire(INT4, hadamard=True)), keeps=True),
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, length, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*qkv, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, WIDTH))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Gpt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(*[Block() for _ in range(LAYERS)])
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """The mean loss of the next tokens; tokens: [batch, LENGTH + 1]."""
        x = self.tokens(tokens[:, :-1]) + self.places.weight
        x = self.head(self.norm(self.blocks(x)))
        return F.cross_entropy(x.flatten(0, 1), tokens[:, 1:].flatten())


class Bf16Gather(AllGather):
    """fp32 weights gathered in bf16 by torch, which is what MixedPrecisionPolicy sends; the arithmetic stays fp32."""

    def allocate(self, size: Sequence[Any], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Any, async_op: bool = False
    ) -> None:
        gathered = torch.empty_like(output_tensor, dtype=torch.bfloat16)
        dist.all_gather_single(gathered, input_tensor.bfloat16(), group=group)
        output_tensor.copy_(gathered)


class Bf16Scatter(ReduceScatter):
    """Gradients likewise, added up in bf16 by torch."""

    allocate = Bf16Gather.allocate

    def __call__(
        self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Any, op: Any, async_op: bool = False
    ) -> None:
        part = torch.empty_like(output_tensor, dtype=torch.bfloat16)
        dist.reduce_scatter_single(part, input_tensor.bfloat16(), op=dist.ReduceOp.SUM, group=group)
        output_tensor.copy_(part)
        if op == dist.ReduceOp.AVG:
            output_tensor /= dist.get_world_size(group)


class Trainer:
    """A model of one contender, sharded, and its text."""

    def __init__(self, contender: Contender, seed: int, node_size: int) -> None:
        torch.manual_seed(seed)
        self.model = Gpt()
        regather = not contender.keeps or node_size > 1
        for block in self.model.blocks:
            fully_shard(block, reshard_after_forward=regather)
        fully_shard(self.model, reshard_after_forward=regather)
        if contender.weights == "bf16":
            for module in [*self.model.blocks, self.model]:
                module.set_custom_all_gather(Bf16Gather())
                module.set_custom_reduce_scatter(Bf16Scatter())
        elif contender.weights is not None:
            ng.fsdp.apply(
                self.model,
                weights=contender.weights,
                gradients=contender.gradients,
                node_size=node_size if node_size > 1 else 0,
                secondary=contender.keeps and node_size > 1,
                exact_below=0,
            )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, weight_decay=0.1)
        text = read_text()
        self.text, self.held_out = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]
        self.generator = torch.Generator().manual_seed(1000 * seed + dist.get_rank())
        self.steps = 0

    def step(self) -> torch.Tensor:
        self.steps += 1
        for group in self.optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, self.steps / WARM_UP)
        loss = self.model(windows(self.text, SEQUENCES, self.generator))
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    @torch.no_grad()
    def evaluate(self) -> float:
        """The loss of 64 sequences on every rank that no step has seen, the same for all contenders and seeds."""
        generator = torch.Generator().manual_seed(dist.get_rank())
        losses = [self.model(windows(self.held_out, 16, generator)) for _ in range(4)]
        return mean(torch.stack(losses).mean())


def read_text() -> torch.Tensor:
    from pydoc_data.topics import topics

    text = "\n".join(topics[topic] for topic in sorted(topics)).encode()
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def windows(text: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    starts = torch.randint(len(text) - LENGTH, (count,), generator=generator)
    return torch.stack([text[start : start + LENGTH + 1] for start in starts]).long()


def mean(value: torch.Tensor) -> float:
    """Of all ranks."""
    total = value.double()
    dist.all_reduce(total)
    return float(total) / dist.get_world_size()


def say(what: Any) -> None:
    if dist.get_rank() == 0:
        print(json.dumps(what), flush=True)


def losses(jobs: list[tuple[str, int]], steps: int) -> None:
    """Two nodes of two ranks, as far as the collectives know; all on this machine."""
    for name, seed in jobs:
        trainer = Trainer(CONTENDERS[name], seed, node_size=2)
        start = time.perf_counter()
        for number in range(steps):
            say({"contender": name, "seed": seed, "step": number, "loss": mean(trainer.step())})
        seconds = time.perf_counter() - start
        say({"contender": name, "seed": seed, "held out": trainer.evaluate(), "seconds": seconds})


def step_times(names: list[str], rounds: int, node_size: int) -> None:
    """A step of every contender in turns, from a barrier on, until the slowest rank has done it."""
    trainers = {name: Trainer(CONTENDERS[name], 0, node_size) for name in names}
    shuffle, order = random.Random(0), list(names)
    for number in range(-2, rounds):
        shuffle.shuffle(order)
        row = {}
        for name in order:
            dist.barrier()
            sent, cpu, start = sent_bytes(), cpu_seconds(), time.perf_counter()
            trainers[name].step()
            taken = time.perf_counter() - start
            dist.barrier()
            mine = torch.tensor([taken, cpu_seconds() - cpu, sent_bytes() - sent], dtype=torch.float64)
            everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
            dist.all_gather(everyone, mine)
            slowest, cpu, sent = torch.stack(everyone).unbind(1)
            row[name] = {"seconds": float(slowest.max()), "cpu": float(cpu.mean()), "bytes": float(sent.mean())}
        if number >= 0:
            say(row)


def main() -> None:
    torch.set_num_threads(1)
    ng.set_threads(1)
    dist.init_process_group("gloo")
    if sys.argv[1] == "loss":
        losses(json.loads(sys.argv[2]), int(sys.argv[3]))
    else:
        step_times(json.loads(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
