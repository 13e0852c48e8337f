"""The app whose functions run here: its channels, and the resources that these functions want."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from trunkline.app.channel import Channel
from trunkline.app.feeds import SubscriptionFunction, one_per_pattern
from trunkline.app.loader import channels_of
from trunkline.app.resources import Resources, shared_resources
from trunkline.app.sessions import SessionFunction
from trunkline.shared.tasks import Fail, Tasks

__all__ = ["HostedApp"]

CLOSE_S: Final = 2.0


class HostedApp:
    """`app` is a reference for `load_channels`, or the channels themselves; "" and none have no functions."""

    def __init__(self, app: str | Sequence[Channel], fail: Fail) -> None:
        self._app = app
        self._tasks = Tasks("resources", fail)
        self._resources: Resources | None = None
        self.subscription_functions: list[SubscriptionFunction] = []
        self.session_functions: dict[str, SessionFunction] = {}
        """By channel."""
        self.resources: Mapping[Any, Any] = {}
        """By type, those that a function wants: handlers may have others, which workers open."""

    async def open(self, timeout_s: float) -> None:
        """Loads the app and opens the resources. Raises `ChannelError` for what cannot work."""
        channels = channels_of(self._app)
        self.subscription_functions = one_per_pattern(
            function for channel in channels for function in channel.subscription_functions
        )
        self.session_functions = {
            function.channel: function for channel in channels if (function := channel.session_function)
        }
        wanted = {kind for function in self.subscription_functions for kind in function.resources}
        wanted |= {kind for function in self.session_functions.values() for kind in function.resources}
        self._resources = Resources(shared_resources(channels, wanted), self._tasks)
        self.resources = await self._resources.open(timeout_s)

    async def close(self) -> None:
        """Closes the resources. Nothing may use them any more."""
        if self._resources is not None:
            await self._resources.close(CLOSE_S)
            await self._tasks.close(CLOSE_S)
