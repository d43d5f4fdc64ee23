"""The floor of `commands`: an echo service written with nats-py. Runs as a process of its own.

python echo.py URL SUBJECT
"""

import asyncio
import sys

import nats
from nats.aio.msg import Msg


async def main(url: str, subject: str) -> None:
    """Answer every request with its own body."""
    client = await nats.connect(url)

    async def echo(msg: Msg) -> None:
        await msg.respond(msg.data)

    await client.subscribe(subject, cb=echo)
    await client.flush()
    print("ready", flush=True)
    await asyncio.Event().wait()


asyncio.run(main(*sys.argv[1:]))
