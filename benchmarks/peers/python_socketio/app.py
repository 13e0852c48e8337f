"""A room on python-socketio with its Redis client manager, as its documentation has it for several processes."""

import os

import socketio

manager = socketio.AsyncRedisManager(os.environ["REDIS_URL"])
sio = socketio.AsyncServer(async_mode="asgi", client_manager=manager)
app = socketio.ASGIApp(sio)


@sio.event
async def join(sid):
    await sio.enter_room(sid, "room")


@sio.event
async def message(sid, data):
    await sio.emit("message", data, room="room")
