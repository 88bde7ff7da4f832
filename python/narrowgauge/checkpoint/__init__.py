"""Checkpoints: directories of safetensors shards and a manifest, committed whole or not at all.

with ng.Checkpointer("run", keep=3) as ck:
    ck.save(step, {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step})
state = ng.load_checkpoint("run")
"""

from narrowgauge.checkpoint.reader import LoadReport, find, load_checkpoint, steps, verify_checkpoint
from narrowgauge.checkpoint.state import PerRank
from narrowgauge.checkpoint.writer import Checkpointer, SaveReport

__all__ = [
    "Checkpointer",
    "LoadReport",
    "PerRank",
    "SaveReport",
    "find",
    "load_checkpoint",
    "steps",
    "verify_checkpoint",
]
