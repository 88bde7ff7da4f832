"""Draws what docs/gpu-linear.md shows, from the constants that the packer and the kernels are compiled with.

    python docs/gpu_linear.py            # writes the drawings into the page
    python docs/gpu_linear.py --check    # exit code 1 if the page has others

The constants are asked of a C++20 compiler ($CXX, c++ by default), which compiles the two headers that have them:
lane_order.hpp and fpx_args.hpp. A drawing stands between `<!-- drawn: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "gpu-linear.md"
RECORD_BYTES = 2 * 64  # of an fp16 scale for each row of a tile

_ASK = r"""
#include <cstdio>
#include "kernels/fpx_args.hpp"
#include "quantize/lane_order.hpp"
using namespace ng;
int main() {
  std::printf("{\"stage_cols\": %d, \"stage_slices\": %d, \"chain_slices\": %d, \"tile_rows\": %d, \"tiles\": [",
              cuda::kStageCols, cuda::kStageSlices, cuda::kChainSlices, cuda::kTileRows);
  for (int i = 0; i < cuda::kTileCount; ++i) {
    const cuda::FpxTile& t = cuda::kTiles[i];
    std::printf("%s{\"x_rows\": %d, \"weight_rows\": %d, \"warps\": %d, \"teams\": %d, \"stages\": %d,",
                i ? ", " : "", t.x_rows, t.weight_rows(), t.warps, t.teams, t.stages);
    std::printf(" \"resident\": %d, \"stage_bytes\": %d, \"shared_bytes\": %d}", t.resident(1),
                t.stage_bytes(6, RECORD_BYTES), t.shared_bytes(6, RECORD_BYTES));
  }
  std::printf("], \"widths\": {");
  for (int bits = 2; bits <= 8; ++bits) {
    std::printf("%s\"%d\": {\"whole\": %d, \"left\": %d, \"pairs\": [", bits > 2 ? ", " : "", bits,
                lane_order::whole_codes(bits), lane_order::left_over(bits));
    for (int pair = 0; pair < lane_order::kPairs; ++pair) {
      const lane_order::Pieces pieces = lane_order::pieces_of(bits, pair);
      std::printf("%s[", pair ? ", " : "");
      for (int i = 0; i < pieces.count; ++i) {
        const lane_order::Piece& p = pieces.piece[i];
        std::printf("%s[%d, %d, %d, %d]", i ? ", " : "", p.word, p.source, p.target, p.bits);
      }
      std::printf("]");
    }
    std::printf("]}");
  }
  std::printf("}}\n");
}
"""


def constants() -> dict[str, Any]:
    """Of the headers. RuntimeError with the compiler's words if they do not compile."""
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder, "ask.cpp"), Path(folder, "ask")
        source.write_text(_ASK)
        command = [os.environ.get("CXX", "c++"), "-std=c++20", f"-I{ROOT}/cpp/src", f"-I{ROOT}/cuda"]
        command += [f"-DRECORD_BYTES={RECORD_BYTES}", str(source), "-o", str(program)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
        return json.loads(subprocess.run([program], capture_output=True, text=True, check=True).stdout)


# --- drawings --------------------------------------------------------------------------------------------------------


def words(known: dict[str, Any], bits: int) -> str:
    """One half of each word of a lane: which pair has which bit, and which of its bits that is."""
    cells = [[""] * 16 for _ in range(bits)]
    for pair, pieces in enumerate(known["widths"][str(bits)]["pairs"]):
        for word, source, target, count in pieces:
            for bit in range(count):
                cells[word][source + bit] = f"{pair}.{target + bit}"
    lines = ["bit    " + " ".join(f"{bit:>4}" for bit in reversed(range(16)))]
    for word, row in enumerate(cells):
        assert all(row), f"{bits} bits: word {word} has bits of no pair"
        lines.append(f"word {word} " + " ".join(f"{cell:>4}" for cell in reversed(row)))
    return code(lines)


def widths(known: dict[str, Any]) -> str:
    """What the words of every width hold, and how a lane reads them."""
    lines = [
        "| bits | whole codes in a half | bits left over | pairs in pieces | pieces of each | a lane reads, bytes |"
    ]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for bits, width in known["widths"].items():
        cut = [len(pieces) for pieces in width["pairs"] if len(pieces) > 1]
        reads, left = [], int(bits)
        for size in (4, 4, 2, 1):  # words
            if size <= left:
                reads.append(str(4 * size))
                left -= size
        pieces = f"{min(cut)}" if cut and min(cut) == max(cut) else f"{min(cut)} or {max(cut)}" if cut else "-"
        lines.append(f"| {bits} | {width['whole']} | {width['left']} | {len(cut)} | {pieces} | {' + '.join(reads)} |")
    return "\n".join(lines)


def tiles(known: dict[str, Any]) -> str:
    lines = ["| rows of x | of weights | warps | teams | threads | stage, bytes | on their way, a block | shared, bytes | blocks a multiprocessor |"]  # fmt: skip # noqa: E501
    lines.append("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for tile in known["tiles"]:
        moving = (tile["stages"] - 1) * tile["teams"] * tile["stage_bytes"]
        lines.append(
            f"| {tile['x_rows']} | {tile['weight_rows']} | {tile['warps'] * tile['teams']} | {tile['teams']} | "
            f"{32 * tile['warps'] * tile['teams']} | {tile['stage_bytes']:,} | {moving:,} | {tile['shared_bytes']:,} | "
            f"{tile['resident']} |"
        )
    return "\n".join(lines)


def block(known: dict[str, Any]) -> str:
    """Which rows and columns the warps of the first and the third tile have."""
    few, many = known["tiles"][0], known["tiles"][2]
    margin, width = 12, 56
    lines = [f"{few['x_rows']} rows of x: each warp is a team, which has columns of its own; the teams' sums are added"]
    teams = range(few["teams"])
    cell = width // len(teams) - 1
    heads, warps = ([f"{name(team):^{cell}}" for team in teams] for name in (
        lambda team: f"columns {team + 1}/{len(teams)}", lambda team: f"warp {team}",
    ))  # fmt: skip
    lines.append(" " * margin + "|" + "|".join(heads) + "|")
    lines.append(f"{few['weight_rows']:>4} rows   |" + "|".join(warps) + "|")
    lines.append("")
    lines.append(f"{many['x_rows']} rows of x: {many['warps']} warps are one team, and have rows of their own")
    lines.append(" " * margin + f"|{'all columns of the range':^{width - 1}}|")
    for warp in range(many["warps"]):
        lines.append(f"{many['weight_rows'] // many['warps']:>4} rows   |{f'warp {warp}':^{width - 1}}|")
    return code(lines)


def pipeline(known: dict[str, Any]) -> str:
    """Stages on their way, in shared memory and in registers, slice by slice."""
    places, slices = known["tiles"][0]["stages"], known["stage_slices"]
    lines = ["columns done     " + " ".join(f"{stage * known['stage_cols']:<{5 * slices - 1}}" for stage in range(3))]
    for place in range(places):
        cells = []
        for stage in range(3):
            held = stage + (place - stage) % places  # the stage that this place has, or is getting
            if held == stage:  # its codes are all in registers before its last slice is multiplied
                cells.append(f"[{f'stage {held} is read':^{5 * slices - 8}}][{held + places}> ]")
            else:
                cells.append(f"[{f'stage {held} arrives >':^{5 * slices - 3}}]")
        lines.append(f"place {place}          " + " ".join(cells))
    decoded = [f"{stage}.{part}" for stage in range(4) for part in range(slices)]
    lines.append("decoded slice    " + " ".join(f"{each:<4}" for each in decoded[1 : 1 + 3 * slices]))
    lines.append("multiplied slice " + " ".join(f"{each:<4}" for each in decoded[: 3 * slices]))
    return code([line.rstrip() for line in lines])


def decoding(known: dict[str, Any]) -> str:
    """The half of pair 12 of fp6_e2m3 on its way to fp16, as fpx_linear.cpp's constants move it."""
    bits, exponent, pair = 6, 2, 12
    mantissa = bits - 1 - exponent
    base, sign = 10 - mantissa, 10 + exponent
    assert base + bits - 1 == sign
    names = [f"m{i}" for i in range(mantissa)] + [f"e{i}" for i in range(exponent)] + ["s"]

    def half(cells: dict[int, str]) -> str:
        return " ".join(f"{cells.get(bit, '.'):>2}" for bit in reversed(range(16)))

    lines = ["bit of the half" + " " * 25 + " ".join(f"{bit:>2}" for bit in reversed(range(16)))]
    whole: dict[int, str] = {}
    for word, source, target, count in known["widths"][str(bits)]["pairs"][pair]:
        piece = {base + target + bit: names[target + bit] for bit in range(count)}
        whole |= piece
        turn = (source - target) % 32
        lines.append(f"{f'word {word} rotated right by {turn}, masked':<40}" + half(piece))
    lines.append(f"{'or-ed: the code':<40}" + half(whole))
    lines.append(f"{f'plus the sign bit times 2^{15 - sign} - 1':<40}" + half({b: n for b, n in whole.items() if n != "s"} | {15: "s"}))  # fmt: skip # noqa: E501
    lines.append(
        f"{'as fp16':<40}" + half({15: "s"} | dict.fromkeys(range(10, 15), "E") | dict.fromkeys(range(10), "M"))
    )
    return code(lines)


def code(lines: list[str]) -> str:
    return "\n".join(["```", *lines, "```"])


def drawings() -> dict[str, str]:
    known = constants()
    return {
        "words 6": words(known, 6),
        "words 5": words(known, 5),
        "widths": widths(known),
        "tiles": tiles(known),
        "block": block(known),
        "pipeline": pipeline(known),
        "decoding": decoding(known),
    }


def redraw(page: str, drawn: dict[str, str]) -> str:
    """The page with these drawings. ValueError if it lacks the place of one, or has one of none."""
    seen = re.findall(r"<!-- drawn: (.*?) -->", page)
    if sorted(seen) != sorted(drawn):
        raise ValueError(f"the page has places for {seen}, expected {list(drawn)}")
    return re.sub(
        r"(<!-- drawn: (.*?) -->\n).*?(<!-- end -->)",
        lambda match: f"{match[1]}\n{drawn[match[2]]}\n\n{match[3]}",
        page,
        flags=re.S,
    )


def main() -> int:
    page = PAGE.read_text()
    new = redraw(page, drawings())
    if sys.argv[1:] == ["--check"]:
        if new != page:
            print(f"{PAGE} is not current: run python docs/gpu_linear.py", file=sys.stderr)
        return int(new != page)
    PAGE.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
