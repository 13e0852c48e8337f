"""Who is in a topic, as handlers see it, and what a policy lets others see of a member."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import msgspec
import pydantic_core

from trunkline.shared.presence import PresencePage

__all__ = ["INFO_BYTES", "Allow", "Member", "Presence", "encode_info", "presence_of"]

INFO_BYTES: Final = 1024


@dataclass(frozen=True, slots=True)
class Allow:
    """What a topic policy may return in place of True: the client may, and `info` is shown to all who may see members.

    `info` is anything that pydantic can turn into JSON, at most 1 KiB. It counts when a client subscribes to a topic with
    presence, and stays as it was then.
    """

    info: Any


@dataclass(frozen=True, slots=True)
class Member:
    """A connection that is subscribed to a topic, its user, and the `info` of the policy or of `ctx.subscribe`."""

    connection_id: str
    user: str | None = None
    info: Any = None


@dataclass(frozen=True, slots=True)
class Presence:
    """Members of a topic, in the order of their connection ids, and how many there are altogether.

    `connections` counts all members, `users` the different users among those that can be listed. `next` is the `cursor` of
    the page after this one; "": there is none.
    """

    connections: int
    users: int
    members: tuple[Member, ...]
    next: str = ""


def encode_info(info: object) -> bytes | None:
    """Returns JSON. Raises `ValueError` if it is too large."""
    if info is None:
        return None
    data = pydantic_core.to_json(info, by_alias=True, inf_nan_mode="null")
    if len(data) > INFO_BYTES:
        raise ValueError(f"the info of a member has {len(data)} bytes of JSON; at most {INFO_BYTES} are allowed")
    return data


def presence_of(page: PresencePage) -> Presence:
    """Returns what a handler sees of a page."""
    members = tuple(
        Member(each.connection_id, each.user, None if each.info is None else msgspec.json.decode(each.info))
        for each in page.members
    )
    return Presence(page.connections, page.users, members, page.next)
