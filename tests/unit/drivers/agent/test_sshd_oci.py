"""vcnode.drivers.agent.sshd.oci and script: texts for shells, and what comes back."""

from __future__ import annotations

import json
import subprocess

import pytest

from vcnode.drivers.agent.sshd import oci, script
from vcnode.errors import InvalidArgumentError, UnsupportedError
from vcnode.models.vm import ContainerRoot, GuestContainer, GuestProcess

USERS = oci.Users("root:x:0:0::/:/bin/sh\nweb:x:1000:1001::/:/bin/sh\nodd\n", "staff:x:50:\n")
LOOKED = "0\nroot\n6.1.0\nboot-id\nsetpriv\ncrun\n.\n"


def container(**fields: object) -> GuestContainer:
    given = {
        "container_id": "c",
        "root": ContainerRoot(shared_name="r"),
        "hostname": "h",
        "process": GuestProcess(args=("true",)),
        **fields,
    }
    return GuestContainer.model_validate(given, strict=False)


@pytest.mark.parametrize(
    ("user", "group", "expected"),
    [
        ("0", None, (0, 0)),
        ("web", None, (1000, 1001)),
        ("1000", None, (1000, 1001)),
        ("4711", None, (4711, 0)),
        ("web", "staff", (1000, 50)),
        ("web", "7", (1000, 7)),
    ],
)
def test_users_are_those_of_the_containers_root(user: str, group: str | None, expected: tuple[int, int]):
    found = USERS.process(GuestProcess(args=("x",), user=user, group=group))["user"]
    assert found == {"uid": expected[0], "gid": expected[1], "additionalGids": []}


@pytest.mark.parametrize("fields", [{"user": "nobody"}, {"group": "nogroup"}])
def test_unknown_users_and_groups(fields: dict[str, str]):
    with pytest.raises(InvalidArgumentError):
        USERS.process(GuestProcess.model_validate({"args": ("x",), **fields}))


def test_a_bundle():
    more = {"envs": (("A", "1"),), "capabilities": ("CAP_KILL",), "rlimits": (("nofile", 1, -1),)}
    process = GuestProcess.model_validate({"args": ("a", "b"), **more})
    made = json.loads(oci.config(container(process=process, readonly=True), USERS))
    assert made["root"] == {"path": "/run/vcnode/shared/r", "readonly": True}
    assert made["process"]["args"] == ["a", "b"]
    assert made["process"]["env"][-1] == "A=1"
    assert made["process"]["capabilities"]["effective"] == ["CAP_KILL"]
    assert made["process"]["rlimits"] == [{"type": "RLIMIT_NOFILE", "soft": 1, "hard": 2**64 - 1}]
    assert {n["type"] for n in made["linux"]["namespaces"]} == {"pid", "ipc", "uts", "mount"}


@pytest.mark.parametrize("fields", [{"root": ContainerRoot(disk_id="d")}, {"stdin": True}, {"tty": True}])
def test_what_has_no_place_in_a_bundle(fields: dict[str, object]):
    with pytest.raises(UnsupportedError):
        oci.root_of(container(**fields))


def test_a_listing():
    text = 'a 7 {"pid": 1, "status": "stopped"}\nb - {"pid": 42, "status": "running"}\nc - \nd - {broken\n'
    assert [(s.container_id, s.state, s.exit_code, s.pid) for s in oci.read_listing(text)] == [
        ("a", "stopped", 7, None),
        ("b", "running", None, 42),
        ("c", "created", None, None),
        ("d", "created", None, None),
    ]


@pytest.mark.parametrize(
    "text",
    [
        oci.prepare("c", "/r"),
        oci.start("crun", "c"),
        oci.watch("c"),
        oci.signal("crun", "c", 9, everyone=True),
        oci.delete("crun", "c"),
        oci.listing("crun"),
        oci.execute("crun", "c", "e", "t", tty=False),
        oci.signal_executed("c", "e", 9),
        script.LOOK,
        script.signal(9, 1, sudo=False),
    ],
)
def test_every_text_is_one_for_a_posix_shell(text: str):
    assert (
        subprocess.run(["sh", "-n", "-c", text], capture_output=True, timeout=10, check=False).stderr == b""
    )


def test_what_the_guest_says_of_itself():
    login = script.Login.read(LOOKED)
    assert login is not None
    assert (login.uid, login.user, login.kernel, login.runtime) == (0, "root", "6.1.0", "crun")
    for broken in ("", "motd\n" + LOOKED, LOOKED.replace("crun", "what"), LOOKED[:-2]):
        assert script.Login.read(broken) is None


def login(uid: int = 0, tools: str = "setpriv") -> script.Login:
    return script.Login(uid, "root" if uid == 0 else "debian", "k", "b", frozenset(tools.split()))


ALL = GuestProcess(args=("id",), user="", capabilities=script.ALL_CAPABILITIES)


@pytest.mark.parametrize(
    ("user", "who", "expected"),
    [
        ("", login(), "exec /bin/sh -c "),
        ("root", login(), "exec /bin/sh -c "),
        ("web", login(), "exec setpriv --reuid=web "),
        ("web", login(tools="prlimit"), "exec su -s /bin/sh web -c "),
        ("", login(1000), "exec /bin/sh -c "),
        ("root", login(1000), "exec sudo -n -u root -- /bin/sh -c "),
        ("0", login(1000), "exec sudo -n -u '#0' -- /bin/sh -c "),
    ],
)
def test_how_another_user_is_reached(user: str, who: script.Login, expected: str):
    process = ALL.model_copy(update={"user": user})
    assert script.start(process, who, "t", tty=False).startswith(expected)
    assert script.needs_sudo(process, who) is ("sudo" in expected)


def test_the_word_is_found_wherever_the_output_is_cut():
    said = b"motd\nabc 123\nrest"
    for at in range(len(said)):
        word = script.Word(b"abc")
        assert word.take(said[:at]) + word.take(said[at:]) == b"rest"
        assert word.pid == 123
