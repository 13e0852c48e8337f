"""What nats-py by itself gets: pipelined `js.publish_async` into a stream on a server that runs already.

    python publish.py nats://127.0.0.1:4222 SUBJECTS IN_FLIGHT SECONDS

prints one JSON object. The stream is like the log of a topic: file storage, some messages per subject.
"""

import json
import sys
import time

import nats
import uvloop

PAYLOAD = b'{"text":"' + b"x" * 89 + b'"}'


async def main(url: str, subjects: int, in_flight: int, seconds: float) -> None:
    client = await nats.connect(url)
    stream = client.jetstream(publish_async_max_pending=in_flight)
    await stream.add_stream(name="bare", subjects=["bare.>"], max_msgs_per_subject=116)
    names = [f"bare.{number}" for number in range(subjects)]
    published = 0
    begun = time.monotonic()
    while time.monotonic() < begun + seconds:
        for _ in range(100):
            await stream.publish_async(names[published % subjects], PAYLOAD)
            published += 1
    await stream.publish_async_completed()
    print(json.dumps({"publications_per_s": round(published / (time.monotonic() - begun), 1), "acknowledged": published}))
    await stream.delete_stream("bare")
    await client.close()


uvloop.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])))
