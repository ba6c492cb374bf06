"""TARGETs of the command line: `[name=]module:attribute` or `[name=]file.py:attribute`."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from ..exceptions import BadInput, TargetError

_HINT = "a target is module:attribute or file.py:attribute, with name= in front to name the service"


def load_targets(targets: list[str]) -> dict[str, Any]:
    """The workflows by service name, in the order given. The current folder is first on the import path.

    Raises:
        TargetError: a target that is malformed, cannot be imported, is no workflow, or has another one's name.
    """
    here = str(Path.cwd())
    if sys.path[:1] != [here]:
        sys.path.insert(0, here)
    loaded: dict[str, Any] = {}
    for target in targets:
        name, workflow = _load(target)
        if name in loaded:
            raise TargetError(
                f"two targets are named {name!r}",
                hint=f"name one of them differently: other={target.partition('=')[2] or target}",
            )
        loaded[name] = workflow
    return loaded


def _load(target: str) -> tuple[str, Any]:
    named, separator, rest = target.partition("=")
    place = rest if separator else target
    where, colon, attribute = place.rpartition(":")
    if not colon or not where or not attribute or (separator and not named):
        raise TargetError(f"{target!r} is no target", hint=_HINT)
    if separator:
        _check_name(named)
    module = _import_file(where) if where.endswith(".py") else _import_module(where)
    value: Any = module
    for part in attribute.split("."):
        try:
            value = getattr(value, part)
        except AttributeError:
            raise TargetError(f"{where} has no attribute {attribute!r}", hint=_known(module)) from None
    return named if separator else attribute, _as_workflow(value, place)


def _check_name(name: str) -> None:
    from ..control_plane.checks import check_id

    try:
        check_id(name, "service_name")
    except BadInput as exc:
        raise TargetError(
            f"{name[:40]!r} is no name for a service", hint="it is short and has no slash and no blank around it"
        ) from exc


def _import_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as exc:  # whatever the user's module raises while it is imported
        raise TargetError(f"{name} cannot be imported: {type(exc).__name__}: {exc}", hint=_HINT) from exc


def _import_file(name: str) -> ModuleType:
    path = Path(name)
    if not path.is_file():
        raise TargetError(f"there is no file {name}", hint=_HINT)
    module_name = _module_name(path)
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(module_name, module)
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(1, folder)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as exc:  # whatever the user's file raises
        raise TargetError(f"{name} cannot be imported: {type(exc).__name__}: {exc}") from exc
    return module


def _module_name(path: Path) -> str:
    """The name that `import` would give the file, so that the types it defines have one qualified name; with something of
    its path if another file has that name already, because types are looked up by the name of their module."""
    known = sys.modules.get(path.stem)
    origin = getattr(known, "__file__", None)
    if known is None or (origin is not None and Path(origin).resolve() == path.resolve()):
        return path.stem
    return f"{path.stem}_{hashlib.sha256(bytes(path.resolve())).hexdigest()[:8]}"


def _as_workflow(value: Any, place: str) -> Any:
    from workflows import Workflow

    if isinstance(value, type) and issubclass(value, Workflow):
        try:
            value = value()
        except Exception as exc:  # a constructor that wants arguments, or a workflow that does not validate
            raise TargetError(
                f"{place} is a class that cannot be made without arguments: {exc}", hint="name an instance of it"
            ) from exc
    if not isinstance(value, Workflow):
        raise TargetError(f"{place} is a {type(value).__name__}, not a workflow", hint="name an instance of a Workflow")
    try:
        value.validate()
    except Exception as exc:  # upstream's WorkflowValidationError, and what resources raise
        raise TargetError(f"{place} is not a valid workflow: {exc}") from exc
    return value


def _known(module: ModuleType) -> str | None:
    from workflows import Workflow

    names = [name for name, value in vars(module).items() if isinstance(value, Workflow)]
    return f"it has: {', '.join(names)}" if names else None
