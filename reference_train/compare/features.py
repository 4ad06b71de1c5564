"""Features in a file that is written once, survives a kill at any time, and is read in parts."""

import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..command_line import RunFailed, UsageError, track

BLOCK = 4096  # rows that are read together
CHUNK = 64  # rows that are written together; a file continues at a whole number of them
MISSING, UNREADABLE = 0, 1  # in place of a digest


class Features:
    """n rows of features: float16 in a file, float32 where they are read.

    Each row has a digest, which is equal for equal inputs. The digest is written after the
    features, so a row with a digest is whole.
    """

    def __init__(self, file: Path, count: int, width: int):
        """Continues the file, or begins it. Raises `UsageError` if the disk is too small for it."""
        self.file, self.count, self.width = file, count, width
        self.dtype = np.dtype([("digest", "<u8"), ("features", "<f2", (width,))])
        size = count * self.dtype.itemsize
        if not file.exists() or file.stat().st_size != size:
            if (free := shutil.disk_usage(file.parent).free) < size:
                raise UsageError(f"{file} needs {size:,} bytes, and {free:,} are free")
            self.open("w+")

    def __len__(self) -> int:
        return self.count

    def open(self, mode: Any = "r") -> np.memmap:
        """The rows of the file.

        Whoever reads maps the file anew each time, because the pages that a map has read count as
        the process's memory as long as the map lives.
        """
        return np.memmap(self.file, self.dtype, mode, shape=(self.count,))

    def digests(self) -> np.ndarray:
        """The digest of each row, (n,) uint64."""
        starts = range(0, self.count, BLOCK)
        return np.concatenate([self.open()["digest"][i : i + BLOCK].copy() for i in starts])

    def __getitem__(self, rows: Any, /) -> Tensor:
        """Rows as float32, (m, width). rows: a slice or indices."""
        return torch.from_numpy(self.open()["features"][rows].astype(np.float32))

    def compute(
        self, encode: Callable[[int], Iterable[tuple[Sequence[int], Tensor | None]]], text: str
    ) -> None:
        """Computes the rows that the file does not have yet.

        encode: gets the first row, and yields for each `CHUNK` of rows from there their digests and
        the features of those that could be read. text: what the bar says.
        """
        missing = (self.digests() == MISSING).nonzero()[0]
        if not len(missing):
            return
        start = int(missing[0]) // CHUNK * CHUNK
        total = -(-(self.count - start) // CHUNK)
        for number, (digests, features) in enumerate(track(encode(start), text, total)):
            first = start + number * CHUNK
            written = self.open("r+")
            rows = written[first : first + len(digests)]
            if features is not None:
                if not features.isfinite().all():
                    raise RunFailed(f"{text}: features are not finite")
                rows["features"][np.array(digests) != UNREADABLE] = features.numpy()
            written.flush()  # the features reach the disk before the digests that vouch for them
            rows["digest"] = digests
            written.flush()
