"""A real nats-server with deploy/nats/users.conf: every role has its own user, and may do only its own job."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

from tests.support.nats import NatsServer, nats_server

__all__ = ["ROLES", "credentials", "nats_server_with_users"]

ROLES: Final = ("edge", "workers", "subscriptions", "publisher", "admin")
USERS: Final = Path(__file__).parents[2] / "deploy" / "nats" / "users.conf"
VARIABLES: Final = {f"NATS_{role.upper()}_PASSWORD": f"password-of-{role}" for role in ROLES}


def credentials(role: str) -> Mapping[str, Any]:
    """The settings with which a role connects."""
    return {"nats_user": role, "nats_password": f"password-of-{role}"}


@asynccontextmanager
async def nats_server_with_users(*arguments: str) -> AsyncIterator[NatsServer]:
    """See `nats_server`."""
    missing = VARIABLES.keys() - os.environ.keys()  # it inherits them at each start, also at a later one
    os.environ.update({name: VARIABLES[name] for name in missing})
    try:
        async with nats_server("-c", str(USERS), *arguments) as server:
            yield server
    finally:
        for name in missing:
            del os.environ[name]
