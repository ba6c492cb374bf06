"""One process at a time: a lock file beside the store that the kernel frees when its holder dies."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from ..exceptions import StoreError


class ProcessLock:
    """Taken on construction. The file stays when it is released: removing it would race with the next one to take it.

    Raises:
        StoreError: another process holds it (its pid is the field `pid`), or the file cannot be written.
    """

    def __init__(self, store: Path) -> None:
        path = store.with_name(store.name + ".lock")
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise StoreError(
                f"The store cannot be locked: {path}: {error.strerror}",
                hint="Make its directory writable, or use another.",
            ) from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            pid = os.pread(self._file, 32, 0).decode("ascii", "replace").strip()
            os.close(self._file)
            holder = f"process {pid}" if pid else "another process"
            raise StoreError(
                f"The store is in use by {holder}: {store}",
                hint="An SQLite store belongs to one process: stop that one, or use another store.",
                pid=int(pid) if pid.isdecimal() else None,
            ) from error
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, f"{os.getpid()}\n".encode("ascii"), 0)

    def release(self) -> None:
        os.ftruncate(self._file, 0)
        os.close(self._file)
