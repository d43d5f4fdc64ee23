"""All commands and who carries them out."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from typing import Any

from vcnode.handlers.container import (
    container_create,
    container_delete,
    container_kill,
    container_list,
    container_logs,
    container_pause,
    container_processes,
    container_resume,
    container_start,
    container_status,
    container_stop,
    container_update,
    container_wait,
)
from vcnode.handlers.exec import container_exec, pod_exec
from vcnode.handlers.image import image_import, image_list, image_pull, image_remove, image_status
from vcnode.handlers.node import (
    node_audit,
    node_cordon,
    node_drain,
    node_info,
    node_label,
    node_ping,
    node_uncordon,
)
from vcnode.handlers.pod import (
    pod_attach_volume,
    pod_bid,
    pod_console,
    pod_create,
    pod_delete,
    pod_detach_volume,
    pod_list,
    pod_pause,
    pod_release,
    pod_resize,
    pod_resume,
    pod_run,
    pod_start,
    pod_stats,
    pod_status,
    pod_stop,
)
from vcnode.handlers.services import Services
from vcnode.handlers.session import (
    container_attach,
    container_copy_in,
    container_copy_out,
    pod_forward,
    session_close,
    session_exec,
    session_list,
    session_resume,
)
from vcnode.models.base import Reply
from vcnode.models.call import Call

Handler = Callable[[Services, Call, Any], Awaitable[Reply] | Reply]
"""Given the services, what came with the command, and the request (of the model that COMMANDS names).

A handler that need not wait for anything is a plain function: its command is answered at once.
"""

ROUTES: dict[str, Handler] = {
    "pod.create": pod_create,
    "pod.start": pod_start,
    "pod.run": pod_run,
    "pod.stop": pod_stop,
    "pod.pause": pod_pause,
    "pod.resume": pod_resume,
    "pod.resize": pod_resize,
    "pod.attach_volume": pod_attach_volume,
    "pod.detach_volume": pod_detach_volume,
    "pod.delete": pod_delete,
    "pod.list": pod_list,
    "pod.status": pod_status,
    "pod.stats": pod_stats,
    "pod.console": pod_console,
    "pod.exec": pod_exec,
    "container.create": container_create,
    "container.start": container_start,
    "container.stop": container_stop,
    "container.kill": container_kill,
    "container.pause": container_pause,
    "container.resume": container_resume,
    "container.update": container_update,
    "container.wait": container_wait,
    "container.processes": container_processes,
    "container.delete": container_delete,
    "container.exec": container_exec,
    "container.list": container_list,
    "container.logs": container_logs,
    "container.status": container_status,
    "container.attach": container_attach,
    "container.copy_in": container_copy_in,
    "container.copy_out": container_copy_out,
    "pod.forward": pod_forward,
    "session.exec": session_exec,
    "session.resume": session_resume,
    "session.close": session_close,
    "session.list": session_list,
    "image.import": image_import,
    "image.pull": image_pull,
    "image.list": image_list,
    "image.status": image_status,
    "image.remove": image_remove,
    "pod.bid": pod_bid,
    "pod.release": pod_release,
    "node.label": node_label,
    "node.cordon": node_cordon,
    "node.uncordon": node_uncordon,
    "node.drain": node_drain,
    "node.audit": node_audit,
    "node.info": node_info,
    "node.ping": node_ping,
}

AT_ONCE = frozenset(verb for verb, handler in ROUTES.items() if not inspect.iscoroutinefunction(handler))
"""Verbs that are answered from memory, without a task, a slot or a deadline of their own."""
