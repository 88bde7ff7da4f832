"""File systems that can lose power: ext4 and xfs on loop devices over sparse files, and a small tmpfs. Linux, root.

A power cut is FS_IOC_SHUTDOWN: the file system stops at once, and what it had not yet written is gone when it is
mounted again. A crash clone is a copy of the image of a live file system, mounted beside it. Neither shows writes that
the device itself had acknowledged and lost: that is the fault backend's part, which enumerates legal states.

Everything is a context manager that undoes itself, also after an error or Ctrl-C.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import signal
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType

_CLONE_NEWNS = 0x00020000
_FS_IOC_SHUTDOWN = 0x8004587D  # _IOR('X', 125, __u32)
_LOGFLUSH, _NOLOGFLUSH = 1, 2

_MEBIBYTES = {"ext4": 96, "xfs": 300}  # mkfs.xfs makes nothing smaller
_MKFS = {"ext4": ["mkfs.ext4", "-q", "-m", "0"], "xfs": ["mkfs.xfs", "-q"]}


def why_not(filesystem: str) -> str:
    """Why `filesystem` cannot be mounted here, or ""."""
    if os.geteuid() != 0:
        return "it needs root"
    if filesystem != "tmpfs":
        for tool in (_MKFS[filesystem][0], "losetup"):
            if not shutil.which(tool):
                return f"{tool} is not installed"
    probe = subprocess.run(
        ["unshare", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, text=True, check=False
    )
    if probe.returncode != 0:
        return f"mounting is refused: {probe.stderr.strip()}"
    if filesystem != "tmpfs" and subprocess.run(["losetup", "-f"], capture_output=True, check=False).returncode != 0:
        return "there is no free loop device"
    return ""


def hide_mounts() -> None:
    """Keeps the mounts of this process and its children from all others: one that copies the mounts it sees into a
    namespace of its own would keep a file system alive over its unmounting, so that no power ever comes back.
    pre: root, and one thread.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS) != 0:
        raise OSError(ctypes.get_errno(), f"unshare: {os.strerror(ctypes.get_errno())}")
    _run("mount", "--make-rprivate", "/")


class Image:
    """A mounted file system in an image file of `folder`."""

    def __init__(self, folder: Path, filesystem: str, mebibytes: int | None = None) -> None:
        self.filesystem = filesystem
        self.file = folder / f"{filesystem}.img"
        self.mount_point = folder / filesystem
        self.device = ""
        self._mebibytes = mebibytes or _MEBIBYTES[filesystem]

    def __enter__(self) -> Image:
        self.mount_point.mkdir()
        with self.file.open("wb") as file:
            file.truncate(self._mebibytes << 20)
        try:
            self.device = _attach(self.file)
            _run(*_MKFS[self.filesystem], self.device)
            _run("mount", self.device, self.mount_point)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with ExitStack() as undo:  # all of it, whatever fails
            undo.callback(self.file.unlink)
            undo.callback(self.mount_point.rmdir)
            undo.callback(_detach, self.file)
            undo.callback(_unmount, self.mount_point)

    def stop(self, *, log: bool) -> None:
        """The power goes. With `log` the journal reaches the disk first: names are there, contents are not."""
        descriptor = os.open(self.mount_point, os.O_RDONLY)
        try:
            fcntl.ioctl(descriptor, _FS_IOC_SHUTDOWN, struct.pack("I", _LOGFLUSH if log else _NOLOGFLUSH))
        finally:
            os.close(descriptor)

    def restart(self) -> None:
        """The power comes back. pre: no process has a file of it open."""
        _unmount(self.mount_point)
        _run("mount", self.device, self.mount_point)

    def sync(self) -> None:
        _run("sync", "--file-system", self.mount_point)

    @contextmanager
    def clone(self, writer: int) -> Iterator[Path]:
        """What the device holds at one instant at which process `writer` was running; the mount point.

        The copy takes longer than an instant, so the writer is stopped for it, and it is made again if anything reached
        the device meanwhile: the file system's own threads are not stopped.
        """
        file, mount_point = self.file.with_name("clone.img"), self.file.with_name("clone")
        mount_point.mkdir()
        try:
            os.kill(writer, signal.SIGSTOP)
            try:
                while True:
                    before = self._writes()
                    _run("cp", "--sparse=always", self.file, file)
                    if before == self._writes() and before[1] == 0:
                        break
            finally:
                os.kill(writer, signal.SIGCONT)
            device = _attach(file)
            options = ["-o", "nouuid"] if self.filesystem == "xfs" else []
            _run("mount", *options, device, mount_point)
            yield mount_point
        finally:
            with ExitStack() as undo:
                undo.callback(file.unlink, missing_ok=True)
                undo.callback(mount_point.rmdir)
                undo.callback(_detach, file)
                undo.callback(_unmount, mount_point)

    def _writes(self) -> tuple[int, int]:
        """Write requests that the device has completed, and requests in flight."""
        numbers = Path(f"/sys/block/{Path(self.device).name}/stat").read_text().split()
        return int(numbers[4]), int(numbers[8])


@contextmanager
def tmpfs(folder: Path, mebibytes: int) -> Iterator[Path]:
    mount_point = folder / "tmpfs"
    mount_point.mkdir()
    try:
        _run("mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "none", mount_point)
        yield mount_point
    finally:
        _unmount(mount_point)
        mount_point.rmdir()


def _run(*command: object) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}: {done.stderr.strip()}")
    return done.stdout.strip()


def _attach(file: Path) -> str:
    # Direct, so that the image has what the device was told, and a write of the device is not a write into the page
    # cache of the file system below.
    return _run("losetup", "--find", "--show", "--direct-io=on", file)


def _detach(file: Path) -> None:
    """By file, because whoever attached it may have been interrupted before it had the device's name."""
    if file.exists():
        for device in _run("losetup", "--noheadings", "--output", "NAME", "--associated", file).split():
            _run("losetup", "--detach", device)


def _unmount(mount_point: Path) -> None:
    """A process that was just killed may still be closing its files: tries for some seconds."""
    deadline = time.monotonic() + 10
    while _is_mounted(mount_point):
        try:
            _run("umount", mount_point)
        except RuntimeError:
            if time.monotonic() > deadline:
                subprocess.run(["umount", "--lazy", mount_point], check=False)
                raise
            time.sleep(0.01)


def _is_mounted(mount_point: Path) -> bool:
    """Asks the kernel's list: after a power cut the mount point itself answers nothing but EIO."""
    return any(line.split()[4] == str(mount_point) for line in Path("/proc/self/mountinfo").read_text().splitlines())
