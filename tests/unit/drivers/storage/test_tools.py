"""Helper programs end with whoever started them."""

import contextlib
import os
import select
import signal
import subprocess
import sys

CODE = """
import asyncio
from vcnode.drivers.storage import tools

async def main():
    script = "echo $$ > /proc/self/fd/%d; exec sleep 1000"
    await tools.run(["/bin/sh", "-c", script], file_bytes=0, pass_fds=(%d,))

asyncio.run(main())
"""


def test_a_tool_does_not_outlive_a_node_agent_that_is_killed():
    reading, writing = os.pipe()
    node = subprocess.Popen([sys.executable, "-c", CODE % (writing, writing)], pass_fds=(writing,))
    try:
        pid = int(os.read(reading, 32))
        pidfd = os.pidfd_open(pid)
    finally:
        node.send_signal(signal.SIGKILL)
        node.wait()
        os.close(writing)
        os.close(reading)
    try:
        assert select.select([pidfd], [], [], 30)[0], "the tool lives on"
    finally:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        os.close(pidfd)
