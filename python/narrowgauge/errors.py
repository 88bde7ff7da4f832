"""The exceptions of narrowgauge, beyond Python's own.

Wrong values raise ValueError, wrong types TypeError, memory that cannot be had MemoryError, and a refusal of the
operating system OSError with its errno.
"""


class Error(RuntimeError):
    """Base of the errors that narrowgauge alone raises."""


class CudaError(Error):
    """CUDA is not there, or the driver or a kernel failed."""


class FileCorrupt(Error, ValueError):
    """A file is not what it claims to be: truncated, altered or hostile."""


class CheckpointError(Error):
    """A checkpoint could not be saved, or was asked for something that it does not hold."""


class CheckpointCorrupt(FileCorrupt):
    """A checkpoint is damaged or hostile; the message names file, tensor and chunk."""


class TransportError(Error):
    """Ranks of a collective do not agree, or one of them has gone. One that is late raises TimeoutError."""


class PerformanceWarning(UserWarning):
    """The call works but does avoidable work."""
