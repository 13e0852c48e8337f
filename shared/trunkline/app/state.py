"""The state of a connection: a small typed value that travels with every call as JSON."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter, ValidationError

from trunkline.shared.wire import STATE_BYTES

__all__ = ["StateCodec"]


class StateCodec:
    """Turns states of one type into bytes and back. No bytes at all stand for None.

    `initial` is the state before anything set one: `{}` read as the type, if `with_default` and it has defaults for all.
    """

    __slots__ = ("_adapter", "initial")

    def __init__(self, annotation: Any = Any, *, with_default: bool = False) -> None:
        self._adapter: TypeAdapter[Any] = TypeAdapter(annotation)
        self.initial = b""
        if with_default:
            try:
                self.initial = self.encode(self._adapter.validate_json(b"{}"))
            except ValidationError:  # it has fields without a default: then None it is
                self.initial = b""

    def decode(self, data: bytes) -> Any:
        """Returns the state. Raises `ValueError` for bytes of another type (left by an older release of a channel)."""
        return self._adapter.validate_json(data) if data else None

    def encode(self, state: Any) -> bytes:
        """Returns the bytes. Raises `ValueError` for another type and for more than 4 KiB."""
        if state is None:
            return b""
        data = self._adapter.dump_json(state, by_alias=True, warnings="error")
        if len(data) > STATE_BYTES:
            raise ValueError(
                f"a state has at most {STATE_BYTES} bytes of JSON, and this one {len(data)}; keep a key instead"
            )
        return data
