"""`narrowgauge checkpoint ls | show | verify | diff | export | prune`: looking after checkpoints."""

from __future__ import annotations

import json as json_text
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from narrowgauge import _native
from narrowgauge._patterns import matches
from narrowgauge.checkpoint import find, steps
from narrowgauge.checkpoint.outline import outline
from narrowgauge.checkpoint.reader import Files
from narrowgauge.cli import FAILED
from narrowgauge.cli.output import JsonOption, Output, human_bytes, table
from narrowgauge.errors import CheckpointError, FileCorrupt

app = typer.Typer(
    help="List, show, verify, compare, export and prune checkpoints.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

PathArgument = Annotated[Path, typer.Argument(help="A directory of checkpoints, or the folder of one step.")]
DirectoryArgument = Annotated[Path, typer.Argument(help="A directory of checkpoints.")]
StepOption = Annotated[int | None, typer.Option(min=0, help="The step; by default the newest.")]
MapOption = Annotated[list[str] | None, typer.Option(metavar="PATTERN", help="Only tensors whose name matches.")]


@app.command("ls")
def ls(directory: DirectoryArgument, json: JsonOption = False) -> None:
    """List the committed steps of a directory."""
    output = Output(json)
    rows: list[dict[str, Any]] = []
    for step in steps(directory):
        folder = find(directory, step)
        row: dict[str, Any] = {"step": step, "path": str(folder), "bytes": None, "files": None, "tensors": None}
        row["modified"] = folder.stat().st_mtime
        try:
            checkpoint = _native.Checkpoint(folder)
            files = checkpoint.files()
            row |= {"bytes": sum(size for _, size in files), "files": len(files)}
            row["tensors"] = len(checkpoint.tensors())
            row["problem"] = None
        except (FileCorrupt, OSError) as error:
            row["problem"] = str(error)
        rows.append(row)
    leftovers = sorted(
        path.name for path in directory.iterdir() if path.name.startswith("step-") and ".tmp-" in path.name
    )
    shown = [
        [
            row["step"],
            human_bytes(row["bytes"]) if row["problem"] is None else "-",
            row["files"] if row["problem"] is None else "-",
            row["tensors"] if row["problem"] is None else "-",
            row["problem"] or "committed",
        ]
        for row in rows
    ]
    title = f"{directory}" + (f": {len(leftovers)} not committed, removed by the next saver" if leftovers else "")
    output.result(
        {"directory": str(directory), "steps": rows, "leftovers": leftovers},
        table([">step", ">size", ">files", ">tensors", "state"], shown, title),
    )


@app.command("show")
def show(path: PathArgument, step: StepOption = None, json: JsonOption = False) -> None:
    """Show the tensors of a checkpoint and the values beside them."""
    output = Output(json)
    folder = find(path, step)
    checkpoint = _native.Checkpoint(folder)
    values = list(outline(checkpoint.state, Files(checkpoint)))
    tensors: list[dict[str, Any]] = [
        {"name": name, "dtype": dtype, "shape": list(shape), "bytes": size, "regions": len(regions)}
        for name, dtype, shape, size, regions in checkpoint.tensors()
    ]
    total = sum(tensor["bytes"] for tensor in tensors)
    output.result(
        {
            "path": str(folder),
            "step": checkpoint.step,
            "files": [{"name": name, "bytes": size} for name, size in checkpoint.files()],
            "tensors": tensors,
            "values": dict(values),
        },
        table(
            ["tensor", "dtype", "shape", ">bytes", ">pieces"],
            ([t["name"], t["dtype"], t["shape"], human_bytes(t["bytes"]), t["regions"]] for t in tensors),
            f"{folder}: {len(tensors)} tensors, {human_bytes(total)} in {len(checkpoint.files())} files",
        ),
        table(["value", "is"], values),
    )


@app.command("verify")
def verify(
    path: PathArgument,
    step: StepOption = None,
    all: Annotated[bool, typer.Option("--all", help="Every step of the directory.")] = False,
    json: JsonOption = False,
) -> None:
    """Read checkpoints and compare every checksum."""
    output = Output(json)
    chosen = [find(path, each) for each in steps(path)] if all else [find(path, step)]
    results: list[dict[str, Any]] = []
    for folder in chosen:
        problem = None
        size = 0
        try:
            checkpoint = _native.Checkpoint(folder)
            size = sum(length for _, length in checkpoint.files())
            with _transfer(output) as progress:
                _verify(checkpoint, progress)
        except (FileCorrupt, OSError) as error:
            problem = str(error)
        results.append({"path": str(folder), "bytes": size, "problem": problem})
    output.result(
        {"checkpoints": results},
        table(
            ["checkpoint", ">bytes", "result"],
            [[each["path"], human_bytes(each["bytes"]), each["problem"] or "sound"] for each in results],
        ),
    )
    if any(each["problem"] for each in results):
        raise typer.Exit(FAILED)


@app.command("diff")
def diff(
    first: PathArgument,
    second: Annotated[Path, typer.Argument(help="Another, or the same directory with --second-step.")],
    first_step: Annotated[int | None, typer.Option(min=0, help="By default the newest.")] = None,
    second_step: Annotated[int | None, typer.Option(min=0, help="By default the newest.")] = None,
    json: JsonOption = False,
) -> None:
    """Compare two checkpoints: tensors by their bytes, values by what they are. Exit code 1 if they differ."""
    output = Output(json)
    a, b = (_native.Checkpoint(find(path, at)) for path, at in ((first, first_step), (second, second_step)))
    differences = list(_differences(a, b))
    output.result(
        {"first": str(a.path), "second": str(b.path), "differences": [list(each) for each in differences]},
        table(["what", str(a.path), str(b.path)], differences)
        if differences
        else f"{a.path} and {b.path} hold the same tensors and values",
    )
    if differences:
        raise typer.Exit(FAILED)


def _differences(a: _native.Checkpoint, b: _native.Checkpoint) -> Iterator[tuple[str, str, str]]:
    theirs = {name: (dtype, shape, regions) for name, dtype, shape, _, regions in b.tensors()}
    for name, dtype, shape, _, regions in a.tensors():
        if (other := theirs.pop(name, None)) is None:
            yield name, f"{dtype} {list(shape)}", "absent"
        elif other[:2] != (dtype, shape):
            yield name, f"{dtype} {list(shape)}", f"{other[0]} {list(other[1])}"
        elif _marks(regions) == _marks(other[2]):
            pass  # the same places with the same checksums
        elif (count := sum(x != y for x, y in zip(_read(a, name), _read(b, name), strict=True))) > 0:
            yield name, f"{dtype} {list(shape)}", f"{count} bytes differ"
    for name, (dtype, shape, _) in theirs.items():
        yield name, "absent", f"{dtype} {list(shape)}"
    values = dict(outline(b.state, Files(b)))
    for place, value in outline(a.state, Files(a)):
        if (other_value := values.pop(place, "absent")) != value:
            yield place, value, other_value
    for place, value in values.items():
        yield place, "absent", value


def _marks(regions: tuple[Any, ...]) -> list[Any]:
    return [(flat, bounds, checksums) for _, flat, bounds, _, _, checksums in regions]


def _read(checkpoint: _native.Checkpoint, name: str) -> bytearray:
    """A tensor's bytes, verified."""
    import ctypes

    found = checkpoint.info(name)
    assert found is not None
    size = next(size for other, _, _, size, _ in checkpoint.tensors() if other == name)
    data = bytearray(size)
    if size:
        address = ctypes.addressof((ctypes.c_char * size).from_buffer(data))
        checkpoint.read([(name, False, [(0, length) for length in found[1]], address, size)], True)
    return data


@app.command("export")
def export(
    path: PathArgument,
    out: Annotated[Path, typer.Argument(help="A .safetensors file, or a folder for a sharded model.")],
    step: StepOption = None,
    map: MapOption = None,
    strip: Annotated[str, typer.Option(help="Taken off the front of names, such as 'model.'.")] = "",
    max_shard: Annotated[float, typer.Option(min=1e-6, help="GB of a file where OUT is a folder.")] = 5.0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="OUT may exist.")] = False,
    json: JsonOption = False,
) -> None:
    """Write a checkpoint's tensors as plain safetensors: one file, or shards with Hugging Face's index."""
    output = Output(json)
    checkpoint = _native.Checkpoint(find(path, step))
    chosen = [
        (name, dtype, shape, size)
        for name, dtype, shape, size, _ in checkpoint.tensors()
        if map is None or any(matches(pattern, name) for pattern in map)
    ]
    if not chosen:
        raise CheckpointError(f"no tensor of {checkpoint.path} matches {map}")
    names = {name: name.removeprefix(strip) for name, *_ in chosen}
    if len(set(names.values())) < len(names) or "" in names.values():
        raise ValueError(f"without {strip!r} in front, two tensors have one name, or one has none")
    single = out.suffix == ".safetensors"
    if out.exists() and not overwrite:
        raise FileExistsError(f"{out} exists; --overwrite replaces it")
    shards: list[list[tuple[str, str, tuple[int, ...], int]]] = [[]]
    for entry in chosen:
        filled = sum(size for *_, size in shards[-1])
        if not single and shards[-1] and filled + entry[3] > max_shard * 1e9:
            shards.append([])
        shards[-1].append(entry)
    if not single:
        out.mkdir(parents=True, exist_ok=True)
    total = sum(size for *_, size in chosen)
    files: dict[str, str] = {}
    with _transfer(output) as progress:
        _verify(checkpoint, progress)  # what is written next comes from the files as they are
        task = progress.add_task("write", total=total)
        for number, shard in enumerate(shards, 1):
            file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
            tensors = []
            for name, dtype, shape, _ in shard:
                tensors.append((names[name], dtype, shape, checkpoint.map(name) or _read(checkpoint, name)))
                files[names[name]] = file
            _native.write_safetensors(out if single else out / file, tensors, {"format": "pt"})
            progress.advance(task, sum(size for *_, size in shard))
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
        (out / "model.safetensors.index.json").write_text(json_text.dumps(index, indent=2) + "\n", encoding="utf-8")
    output.result(
        {
            "checkpoint": str(checkpoint.path),
            "out": str(out),
            "tensors": len(chosen),
            "bytes": total,
            "files": len(shards),
        },
        f"{out}: {len(chosen)} tensors, {human_bytes(total)} in {len(shards)} files",
    )


@app.command("prune")
def prune(
    directory: DirectoryArgument,
    keep: Annotated[int, typer.Option(min=1, help="The newest steps that stay.")],
    keep_every: Annotated[int, typer.Option(min=0, help="Multiples of this stay too; 0: none.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell.")] = False,
    json: JsonOption = False,
) -> None:
    """Remove old steps, and what savers that died have left. The newest step always stays."""
    output = Output(json)
    removed = _native.prune_checkpoints(directory, keep, keep_every, dry_run)
    verb = "would remove" if dry_run else "removed"
    output.result(
        {"directory": str(directory), "removed": removed, "kept": [s for s in steps(directory) if s not in removed]},
        f"{directory}: {verb} {', '.join(map(str, removed)) or 'nothing'}",
    )


def _verify(checkpoint: _native.Checkpoint, progress: Progress) -> None:
    task = progress.add_task(f"verify {checkpoint.path.name}", total=None)

    def update(done: int, total: int) -> None:
        progress.update(task, completed=done, total=total)

    checkpoint.verify(update)


def _transfer(output: Output) -> Progress:
    return output.progress(TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
