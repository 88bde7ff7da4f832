"""bench/netlab.py: hosts that are namespaces, and nothing left of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"
sys.path.insert(0, str(BENCH))

import netlab  # noqa: E402

if reason := netlab.why_not():
    pytest.skip(reason, allow_module_level=True)

PING = """
import os, socket, time
rank = int(os.environ["RANK"])
if rank == 0:
    with socket.create_server((os.environ["MASTER_ADDR"], 4000)) as server:
        server.accept()[0].sendall(b"x" * 100_000)
else:
    while True:
        try:
            connection = socket.create_connection((os.environ["MASTER_ADDR"], 4000))
            break
        except ConnectionRefusedError:
            time.sleep(0.05)  # every try is a packet that counts
    received = 0
    while data := connection.recv(65536):
        received += len(data)
    assert received == 100_000
sent = int(open("/sys/class/net/eth0/statistics/tx_bytes").read())
assert sent > 100_000 if rank == 0 else sent < 20_000, sent
"""


def namespaces() -> str:
    return subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout


def test_hosts_reach_each_other_and_their_bytes_are_counted() -> None:
    before = namespaces()
    with netlab.Lab(2, "100mbit") as lab:
        assert namespaces() != before
        assert lab.run([sys.executable, "-c", PING]) == 0
    assert namespaces() == before


def test_all_end_when_one_fails_and_nothing_is_left() -> None:
    before = namespaces()
    code = "import os, sys, time; time.sleep(0 if os.environ['RANK'] == '1' else 600); sys.exit(3)"
    done = subprocess.run(
        [sys.executable, BENCH / "netlab.py", "--hosts", "3", "--rate", "none", "--", sys.executable, "-c", code],
        timeout=120,
        check=False,
    )
    assert done.returncode == 3
    assert namespaces() == before


def test_a_signal_leaves_nothing() -> None:
    before = namespaces()
    command = [sys.executable, BENCH / "netlab.py", "--hosts", "2", "--", sys.executable, "-c"]
    code = "import time; print('up', flush=True); time.sleep(600)"
    with subprocess.Popen([*command, code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline().startswith("up")
        process.terminate()
        assert process.wait(timeout=60) == 143
    assert namespaces() == before


def test_no_hosts_are_refused() -> None:
    with pytest.raises(ValueError, match="0 hosts of 1 ranks"):
        netlab.Lab(0, None)
