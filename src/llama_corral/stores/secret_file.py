"""The secret of a store in a file, where its operator gave none: made at the first start, kept beside the file."""

from __future__ import annotations

import os
import secrets
import sqlite3
import stat
from pathlib import Path
from typing import Final

from pydantic import SecretStr

from ..exceptions import StoreError
from .urls import sqlite_path

_BYTES: Final = 32
_ELSEWHERE: Final = "or set CORRAL_STATE_SECRET"


class SecretFile:
    """`NAME.secret` beside a store: 32 random bytes as hexadecimal digits, readable by its owner alone.

    Made before the store is opened, which is what decides whether the file is ours at all; nothing is written until
    `keep`. All methods block.

    Args:
        store: The file of the store.

    Raises:
        StoreError: there is a secret, but it cannot be used.
    """

    def __init__(self, store: Path) -> None:
        self._store = Path(os.path.realpath(store))
        self.path = self._store.with_name(f"{self._store.name}.secret")
        found = self._read()
        self._kept = found is not None
        self.secret = SecretStr(found if found is not None else secrets.token_hex(_BYTES))

    def keep(self) -> None:
        """Write a new secret down, before anything is sealed with it. The store must be open, so that nobody else has it.

        Raises:
            StoreError: it cannot be written; or the store holds state that was sealed with another secret.
        """
        if self._kept:
            return
        if _holds_sealed_state(self._store):
            raise StoreError(
                f"The state in {self._store} is sealed, and its secret is gone: there is no file {self.path}",
                hint=f"Restore that file from a backup, {_ELSEWHERE}.",
            )
        try:
            self._write()
        except OSError as error:
            raise StoreError(
                f"The secret of the store cannot be written: {self.path}: {error.strerror}",
                hint=f"Make the folder writable, {_ELSEWHERE}.",
            ) from error
        self._kept = True

    def _read(self) -> str | None:
        try:
            with self.path.open("rb") as file:
                mode = os.fstat(file.fileno()).st_mode
                content = file.read(2 * _BYTES + 2).decode("ascii", errors="replace").strip()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StoreError(
                f"The secret of the store cannot be read: {self.path}: {error.strerror}",
                hint=f"Let this user read it, {_ELSEWHERE}.",
            ) from error
        if stat.S_IMODE(mode) & 0o077:
            raise StoreError(f"Others may read the secret of the store: {self.path}", hint=f"chmod 600 {self.path}")
        try:
            complete = len(bytes.fromhex(content)) == _BYTES
        except ValueError:
            complete = False
        if not complete:
            raise StoreError(
                f"The secret of the store is damaged: {self.path}", hint=f"Restore it from a backup, {_ELSEWHERE}."
            )
        return content

    def _write(self) -> None:
        """Whole or not at all, whenever the process or the machine stops."""
        draft = self.path.with_name(f"{self.path.name}.{os.getpid()}")
        draft.unlink(missing_ok=True)
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(descriptor, "w") as file:
                file.write(self.secret.get_secret_value() + "\n")
                file.flush()
                os.fsync(file.fileno())
            draft.rename(self.path)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def read_secret_file(url: str) -> SecretFile | None:
    """The secret of the store that a URL names; None for one in memory, which needs none, and for one on a server, which has
    no place of its own for it. Blocks.

    Raises:
        StoreError: the URL names no store that can be used, or there is a secret that cannot be used.
    """
    path = sqlite_path(url)
    return None if path is None else SecretFile(path)


def _holds_sealed_state(store: Path) -> bool:
    connection = sqlite3.connect(store.as_uri() + "?mode=ro", uri=True)
    try:
        (found,) = connection.execute(
            "SELECT EXISTS (SELECT 1 FROM corral_contexts WHERE seal IS NOT NULL)"
            " OR EXISTS (SELECT 1 FROM corral_checkpoints WHERE seal IS NOT NULL)"
        ).fetchone()
    finally:
        connection.close()
    return bool(found)
