"""The allocations of a real training step: sizes and lifetimes of every tensor storage of a small transformer.

torch's profiler records each allocation and each free of its CPU allocator. Steps of the same model ask for the same
sizes in the same order (checked), so one step, and which of its blocks live on into the next, describes them all.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile, record_function


class Event(NamedTuple):
    """slot: the number of an allocation within the step. size > 0 allocates it; size 0 frees what was put there `age`
    steps ago (0: in this step)."""

    slot: int
    size: int
    age: int


class Trace(NamedTuple):
    kept: list[int]  # sizes of what lives through all steps: parameters and optimizer state
    events: list[Event]


def record(layers: int = 2, width: int = 64, heads: int = 4, batch: int = 2, length: int = 32) -> Trace:
    torch.manual_seed(0)
    vocabulary = 128
    layer = torch.nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.1, batch_first=True, norm_first=True)
    model = torch.nn.ModuleDict(
        {
            "embed": torch.nn.Embedding(vocabulary, width),
            "body": torch.nn.TransformerEncoder(layer, layers, enable_nested_tensor=False),
            "head": torch.nn.Linear(width, vocabulary),
        }
    )
    optimizer = torch.optim.AdamW(model.parameters())
    tokens = torch.randint(vocabulary, (batch, length + 1))
    mask = torch.nn.Transformer.generate_square_subsequent_mask(length)

    def step() -> None:
        optimizer.zero_grad()
        hidden = model["body"](model["embed"](tokens[:, :-1]), mask=mask, is_causal=True)
        logits = model["head"](hidden)
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()

    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for _ in range(3):
            with record_function("step"):
                step()
    kept = [p.nbytes for p in model.parameters()]
    kept += [t.nbytes for state in optimizer.state.values() for t in state.values()]
    return Trace(kept, _one_step(profiler))


def _one_step(profiler: profile) -> list[Event]:
    starts, raw = [], []

    def walk(nodes: list) -> None:
        for node in nodes:
            if node.tag == _EventType.Allocation:
                raw.append((node.start_time_ns, node.extra_fields.ptr, node.extra_fields.alloc_size))
            elif node.name == "step":
                starts.append(node.start_time_ns)
            walk(node.children)

    walk(profiler.profiler.kineto_results.experimental_event_tree())
    raw.sort(key=lambda event: event[0])
    starts.sort()
    assert len(starts) == 3, starts
    steps: list[list[Event]] = [[], [], []]
    slots = [0, 0, 0]
    live: dict[int, tuple[int, int, int]] = {}  # address: step, slot, size
    for time, address, size in raw:
        number = max(sum(time >= start for start in starts) - 1, 0)
        if size > 0:
            live[address] = (number, slots[number], size)
            steps[number].append(Event(slots[number], size, 0))
            slots[number] += 1
        elif address in live:  # not one from before the recording
            born, slot, expected = live.pop(address)
            assert size == -expected, (size, expected)
            steps[number].append(Event(slot, 0, number - born))
    assert steps[1] == steps[2], "two training steps differ in their allocations"
    assert all(event.age <= 1 for event in steps[2])
    return steps[2]
