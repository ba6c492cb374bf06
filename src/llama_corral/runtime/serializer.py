"""How a Context is written as JSON: upstream's serializer, and what agents remember."""

from __future__ import annotations

import json
from typing import Any

import pydantic_core
from pydantic import BaseModel
from pydantic_core import PydanticSerializationError

from .upstream import BaseSerializer, JsonSerializer


class KeptElsewhere(ValueError):
    """A part of the value is not in what it dumps: restored from there, it would be another one."""


class ContextSerializer(JsonSerializer):
    """Upstream's JSON serializer, with another way for llama-index components whose `to_dict()` fails or is no JSON.

    Upstream takes such a failure of an agent's memory for expected: it leaves the memory out of the Context and warns, so
    that the next run has forgotten the conversation. That is what becomes of a ChatMemoryBuffer with pydantic 2.14, and of
    a message with an image with every version. Here they are written field by field instead.
    """

    def serialize(self, value: Any) -> str:
        """As upstream's, except that the error does not show the whole value.

        Raises:
            ValueError: the value is not JSON. KeptElsewhere, or whatever it was, is the cause.
        """
        try:
            return json.dumps(self.serialize_value(value))
        except Exception as exc:  # whatever a user's serializer raises
            raise ValueError(f"a {type(value).__name__} cannot be written as JSON: {exc}") from exc

    def serialize_value(self, value: Any) -> Any:
        if not isinstance(value, BaseModel) or not hasattr(value, "class_name"):
            return super().serialize_value(value)
        try:
            encoded = super().serialize_value(value)
            json.dumps(encoded)
        except (PydanticSerializationError, TypeError, ValueError):
            cls = type(value)
            name = f"{cls.__module__}.{cls.__name__}"
            return {"__is_component": True, "value": _by_field(value), "qualified_name": name}
        return encoded


def as_context_serializer(serializer: BaseSerializer) -> BaseSerializer:
    """Ours in place of upstream's JsonSerializer, with the same types allowed. Any other one was somebody's choice."""
    if type(serializer) is not JsonSerializer:
        return serializer
    ours = ContextSerializer()
    vars(ours).update(vars(serializer))
    return ours


def _by_field(model: BaseModel) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        if not field.exclude:
            fields[name] = _jsonable(value)
        elif isinstance(value, BaseModel):  # a tokenizer comes back by itself, a store does not
            raise KeptElsewhere(f"a {type(model).__name__} does not write its {name}")
    if hasattr(model, "class_name"):
        fields["class_name"] = model.class_name()
    return fields


def _jsonable(value: Any) -> Any:
    if isinstance(value, BaseModel):
        try:
            return value.model_dump(mode="json")
        except PydanticSerializationError:
            return _by_field(value)
    if isinstance(value, dict):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    return pydantic_core.to_jsonable_python(value)
