"""A network on one machine: hosts as network namespaces, each on a link of a given rate to one switch. Linux, root.

    python bench/netlab.py --hosts 4 --rate 200mbit -- python job.py   # a rank of torch.distributed on every host

A link is a pair of virtual Ethernet devices with tc's token bucket on both ends; the switch is a bridge in a namespace
of its own. Links have no delay beyond the kernel's. All of it goes when the program does, whatever ends it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType

_PORT = 29555


def why_not() -> str:
    """Why there can be no lab here, or ""."""
    if sys.platform != "linux":
        return "it needs Linux's network namespaces"
    if os.geteuid() != 0:
        return "it needs root"
    for tool in ("ip", "tc"):
        if not shutil.which(tool):
            return f"{tool} is not installed: apt-get install iproute2"
    try:
        with Lab(1, "1gbit"):
            return ""
    except RuntimeError as error:
        return f"a namespace with a shaped link is refused: {error}"


class Lab:
    """Hosts 0 .. hosts - 1 with addresses 10.77.0.1 and up, while it is entered.

    rate: of each link and direction, as tc writes it ("200mbit", "1gbit"), or None for as fast as the kernel goes.
    ranks: of a host; those of host 0 are the first.
    """

    def __init__(self, hosts: int, rate: str | None, ranks: int = 1) -> None:
        if hosts < 1 or ranks < 1:
            raise ValueError(f"{hosts} hosts of {ranks} ranks, expected at least 1 of each")
        self.hosts, self.rate, self.ranks = hosts, rate, hosts * ranks
        self._name = f"ng{os.getpid()}"
        self._undo = ExitStack()

    def __enter__(self) -> Lab:
        try:
            self._build()
        except BaseException:
            self._undo.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._undo.close()

    def namespace(self, host: int) -> str:
        return f"{self._name}h{host}"

    def start(self, rank: int, command: Sequence[str], **options: object) -> subprocess.Popen[str]:
        """A command as a rank, on its host, with what torch.distributed finds its peers by. The lab's end kills it."""
        environment = {
            **os.environ,
            "RANK": str(rank),
            "WORLD_SIZE": str(self.ranks),
            "MASTER_ADDR": "10.77.0.1",
            "MASTER_PORT": str(_PORT),
            "GLOO_SOCKET_IFNAME": "eth0",
        }
        host = rank // (self.ranks // self.hosts)
        inside = ["ip", "netns", "exec", self.namespace(host), *command]
        process = subprocess.Popen(inside, env=environment, text=True, **options)  # type: ignore[call-overload]
        self._undo.callback(end, process)
        return process  # type: ignore[no-any-return]

    def run(self, command: Sequence[str]) -> int:
        """A command as all ranks, until they have ended or one has failed: the first exit code that is not 0, or 0."""
        return wait_for_all([self.start(rank, command) for rank in range(self.ranks)])

    def _build(self) -> None:
        switch = f"{self._name}sw"
        self._namespace(switch)
        _run("ip", "-n", switch, "link", "add", "br0", "type", "bridge")
        _run("ip", "-n", switch, "link", "set", "br0", "up")
        for host in range(self.hosts):
            name, port = self.namespace(host), f"p{host}"
            self._namespace(name)
            _run("ip", "-n", name, "link", "add", "eth0", "type", "veth", "peer", "name", port, "netns", switch)
            _run("ip", "-n", switch, "link", "set", port, "master", "br0", "up")
            _run("ip", "-n", name, "addr", "add", f"10.77.0.{host + 1}/24", "dev", "eth0")
            _run("ip", "-n", name, "link", "set", "eth0", "up")
            if self.rate:
                for where, device in ((name, "eth0"), (switch, port)):
                    bucket = ("tbf", "rate", self.rate, "burst", "256kb", "latency", "50ms")
                    _run("ip", "netns", "exec", where, "tc", "qdisc", "replace", "dev", device, "root", *bucket)

    def _namespace(self, name: str) -> None:
        _run("ip", "netns", "add", name)
        self._undo.callback(_run, "ip", "netns", "del", name)
        _run("ip", "-n", name, "link", "set", "lo", "up")


def wait_for_all(processes: list[subprocess.Popen[str]]) -> int:
    """Until all have ended or one has failed: its exit code, or 0."""
    left = list(processes)
    while left:
        pid, status = os.waitpid(-1, 0)
        for process in left:
            if process.pid == pid:
                process.returncode = os.waitstatus_to_exitcode(status)
        left = [process for process in left if process.returncode is None]
        if any(process.returncode for process in processes):
            break
    return next((process.returncode for process in processes if process.returncode), 0)


def end(process: subprocess.Popen[str]) -> None:
    if process.returncode is None:
        process.kill()
        process.wait()


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")


def exit_on_signals() -> None:
    """So that namespaces are undone on the way out, whatever else comes then."""
    signals = (signal.SIGINT, signal.SIGTERM)

    def leave(number: int, frame: object) -> None:
        for each in signals:
            signal.signal(each, signal.SIG_IGN)
        sys.exit(128 + number)

    for each in signals:
        signal.signal(each, leave)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=4)
    parser.add_argument("--ranks", type=int, default=1, help="of a host")
    parser.add_argument("--rate", default="1gbit", help='such as 200mbit; "none": not shaped')
    parser.add_argument("command", nargs="+", help="after --")
    args = parser.parse_args()
    if reason := why_not():
        print(f"netlab: {reason}", file=sys.stderr)
        return 2
    exit_on_signals()
    with Lab(args.hosts, None if args.rate == "none" else args.rate, args.ranks) as lab:
        return lab.run(args.command)


if __name__ == "__main__":
    sys.exit(main())
