"""The floor of `fleet`, without code of vcnode: requests, replies and KV puts with nats-py alone.

python bare_fleet.py answer URL SUBJECT
python bare_fleet.py ask URL SUBJECT BUCKET COUNT IN_FLIGHT PLACEMENT

PLACEMENT is JSON: ``{"requests": [[bytes sent, bytes of the reply], ...], "puts": [bytes, ...]}``. Who
answers prints ``ready``. Who asks prints ``ready``, waits for a line, does all of it COUNT times, IN_FLIGHT
at once, prints ``done``, and waits for the end of its input.
"""

import asyncio
import json
import os
import sys

import nats
from nats.aio.msg import Msg


async def answer(url: str, subject: str) -> None:
    """Reply with as many bytes as the last token of the subject says."""
    client = await nats.connect(url)
    bodies: dict[str, bytes] = {}

    async def on_request(msg: Msg) -> None:
        size = msg.subject.rpartition(".")[2]
        if size not in bodies:
            bodies[size] = b"x" * int(size)
        await msg.respond(bodies[size])

    await client.subscribe(f"{subject}.*", cb=on_request)
    await client.flush()
    print("ready", flush=True)
    await asyncio.Event().wait()


async def ask(url: str, subject: str, bucket: str, count: int, in_flight: int, placement: str) -> None:
    """Do what so many placements need."""
    needed = json.loads(placement)
    requests = [(f"{subject}.{received}", b"x" * sent) for sent, received in needed["requests"]]
    puts = [b"x" * size for size in needed["puts"]]
    client = await nats.connect(url)
    kv = await client.jetstream().key_value(bucket)
    left = iter(range(count))

    async def work(worker: int) -> None:
        for number in left:
            for target, body in requests:
                await client.request(target, body, timeout=30)
            for body in puts:
                await kv.put(f"{os.getpid()}.{worker}-{number}", body)

    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    await asyncio.gather(*(work(worker) for worker in range(in_flight)))
    print("done", flush=True)
    await asyncio.to_thread(sys.stdin.readline)  # its CPU time is looked at before it ends


if __name__ == "__main__":
    if sys.argv[1] == "answer":
        asyncio.run(answer(*sys.argv[2:]))
    else:
        url, subject, bucket, count, in_flight, placement = sys.argv[2:]
        asyncio.run(ask(url, subject, bucket, int(count), int(in_flight), placement))
