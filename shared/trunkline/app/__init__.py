"""What users import: `from trunkline.app import Channel, Context, Reject`."""

from trunkline.app.channel import Channel
from trunkline.app.context import Connection, Context, User
from trunkline.app.errors import ChannelError, Reject
from trunkline.app.feeds import TopicFeed
from trunkline.app.presence import Allow, Member, Presence
from trunkline.app.routes import Next
from trunkline.app.sessions import Message, Session
from trunkline.app.types import Delivery, Disconnect, Kind, Operation
from trunkline.shared.errors import CloseCode, ErrorCode, TrunklineError
from trunkline.shared.positions import Position

__all__ = [
    "Allow",
    "Channel",
    "ChannelError",
    "CloseCode",
    "Connection",
    "Context",
    "Delivery",
    "Disconnect",
    "ErrorCode",
    "Kind",
    "Member",
    "Message",
    "Next",
    "Operation",
    "Position",
    "Presence",
    "Reject",
    "Session",
    "TopicFeed",
    "TrunklineError",
    "User",
]
