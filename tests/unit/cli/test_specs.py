from __future__ import annotations

import signal

import pytest

from vcnode.cli import specs
from vcnode.cli.exits import UsageError
from vcnode.cli.specs import (
    CmdFlags,
    ContainerFlags,
    PodFlags,
    cmd,
    container_spec,
    pairs,
    parse,
    pod_spec,
    signal_number,
)


def fields(error: UsageError) -> set[str]:
    return {violation["field"] for violation in error.details["violations"]}


def test_pod_from_flags() -> None:
    spec = pod_spec(
        None,
        PodFlags(pod_id="p1", memory_mib=256, vcpus=2, label=("a=b", "c=d=e")),
        ContainerFlags(
            image="busybox", cpus=0.5, mem_limit_mib=64, cmd=CmdFlags(args=("sleep", "60"), env=("X=",))
        ),
    )

    assert spec.id == "p1"
    assert (spec.resources.vcpu_count, spec.resources.mem_size_mib) == (2, 256)
    assert spec.labels == {"a": "b", "c": "d=e"}
    [container] = spec.containers
    assert container.id == "main"
    assert container.cmd.args == ("sleep", "60")
    assert [(e.var, e.value) for e in container.cmd.envs] == [("X", "")]
    assert (container.resources.cpu_quota_us, container.resources.mem_limit_mib) == (50_000, 64)


def test_pod_without_flags_is_an_empty_pod() -> None:
    spec = pod_spec(None, PodFlags(), ContainerFlags())

    assert spec.id is None
    assert spec.containers == ()


def test_flags_win_over_the_file_field_by_field() -> None:
    file = {"id": "a", "resources": {"vcpu_count": 2, "mem_size_mib": 512}, "labels": {"x": "1", "y": "2"}}

    spec = pod_spec(file, PodFlags(pod_id="b", memory_mib=256, label=("y=3",)), ContainerFlags())

    assert spec.id == "b"
    assert (spec.resources.vcpu_count, spec.resources.mem_size_mib) == (2, 256)
    assert spec.labels == {"x": "1", "y": "3"}


def test_containers_come_from_the_file_or_from_flags() -> None:
    with pytest.raises(UsageError, match="not both"):
        pod_spec({"containers": [{"image": "a"}]}, PodFlags(), ContainerFlags(image="b"))


@pytest.mark.parametrize(
    "flags", [ContainerFlags(readonly=True), ContainerFlags(image="a", rootfs="/b")], ids=["neither", "both"]
)
def test_a_container_has_exactly_one_root(flags: ContainerFlags) -> None:
    with pytest.raises(UsageError, match="exactly one of --image and --rootfs"):
        pod_spec(None, PodFlags(), flags)


def test_wrong_values_are_all_named() -> None:
    with pytest.raises(UsageError) as caught:
        pod_spec(None, PodFlags(pod_id="No!", memory_mib=1), ContainerFlags())

    assert fields(caught.value) == {"id", "resources.mem_size_mib"}


def test_unknown_fields_of_a_file_are_named() -> None:
    with pytest.raises(UsageError) as caught:
        pod_spec({"memory": 3}, PodFlags(), ContainerFlags())

    assert fields(caught.value) == {"memory"}


def test_values_that_json_does_not_have_are_refused() -> None:
    file = parse(b"id = 2030-01-01", "pod.toml")

    with pytest.raises(UsageError):
        pod_spec(file, PodFlags(), ContainerFlags())


def test_container_file_takes_an_id_and_nothing_else() -> None:
    spec = container_spec({"image": "a"}, ContainerFlags(container_id="c"))
    assert (spec.id, spec.image) == ("c", "a")

    with pytest.raises(UsageError, match="not both"):
        container_spec({"image": "a"}, ContainerFlags(readonly=True))


def test_cmd_keeps_arguments_as_they_are() -> None:
    made = cmd(CmdFlags(args=("echo", "", "--x", "ü\n"), workdir="/w", user="nobody"))

    assert made.args == ("echo", "", "--x", "ü\n")
    assert (made.workdir, made.user) == ("/w", "nobody")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (b'{"id": "p"}', "pod.json"),
        (b'  {"id": "p"}', "standard input"),
        (b'id = "p"', "x"),
        (b'id="p"', "a.toml"),
    ],
)
def test_files_are_json_or_toml(text: bytes, name: str) -> None:
    assert parse(text, name) == {"id": "p"}


@pytest.mark.parametrize(
    "text",
    [b"{", b"[1]", b"\xff", b"id = ", b'{"id": 1', b"[" * 100_000],
    ids=["open", "list", "binary", "toml", "cut", "deep"],
)
def test_files_of_another_kind_are_refused(text: bytes) -> None:
    with pytest.raises(UsageError, match="standard input"):
        parse(text, "standard input")


@pytest.mark.parametrize("word", ["", "a", "=b"])
def test_pairs_need_a_key_and_an_equals_sign(word: str) -> None:
    with pytest.raises(UsageError, match="--label needs KEY=VALUE"):
        pairs([word], "--label")


@pytest.mark.parametrize(
    ("text", "number"), [("HUP", 1), ("sighup", 1), ("9", 9), ("64", 64), ("TERM", signal.SIGTERM)]
)
def test_signals_by_name_and_number(text: str, number: int) -> None:
    assert signal_number(text) == number


@pytest.mark.parametrize("text", ["0", "65", "", "SIG", "FOO", "-1", "1.5"])
def test_signals_that_do_not_exist(text: str) -> None:
    with pytest.raises(UsageError, match="no signal"):
        signal_number(text)


def test_flags_of_the_network_become_its_description():
    flags = specs.PodFlags(
        join=("blue", "red"),
        interworking="bridged",
        publish=("8080:80", "53:5353/udp"),
        rate_mbit=10.0,
        dns=("10.0.0.53",),
    )
    network = specs.pod_spec(None, flags, specs.ContainerFlags()).network
    assert network.networks == ("blue", "red")
    assert [(p.host, p.container, p.protocol) for p in network.ports] == [
        (8080, 80, "tcp"),
        (53, 5353, "udp"),
    ]
    assert (network.rate_mbit.ingress, network.rate_mbit.egress) == (10, 10)
    assert network.dns.servers == ("10.0.0.53",)


@pytest.mark.parametrize("text", ["80", "80:", "80:80/sctp", "a:b"])
def test_a_port_that_is_none_is_told_how_to_write_it(text):
    with pytest.raises(UsageError, match="HOST:CONTAINER"):
        specs.pod_spec(None, specs.PodFlags(publish=(text,)), specs.ContainerFlags())


def test_probes_and_what_becomes_without_nats_come_from_flags() -> None:
    flags = ContainerFlags(
        image="busybox",
        startup_probe="period=0.5,failures=60,tcp:5432",
        readiness_probe="http:8080/ready?a=1,b=2",
        liveness_probe="timeout=5,exec:sh -c 'test -e /ok, && true'",
    )
    spec = pod_spec(None, PodFlags(on_disconnect="stop:60"), flags)
    assert (spec.on_disconnect.action, spec.on_disconnect.after_s) == ("stop", 60.0)
    startup, readiness, liveness = (
        getattr(spec.containers[0].probes, name) for name in ("startup", "readiness", "liveness")
    )
    assert (startup.period_s, startup.failure_threshold, startup.tcp.port) == (0.5, 60, 5432)
    assert (readiness.http.port, readiness.http.path) == (8080, "/ready?a=1,b=2")
    assert (liveness.timeout_s, liveness.exec.args) == (5.0, ("sh", "-c", "test -e /ok, && true"))
    assert specs.probe("http:80", "--x") == {"http": {"port": 80, "path": None}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("8080", "write exec:COMMAND, tcp:PORT or http:PORT/PATH"),
        ("exec: ", "write exec:COMMAND"),
        ("exec:'a", "No closing quotation"),
        ("tcp:http", "'http' is no whole number"),
        ("every=5,tcp:80", "no setting 'every'; there are delay, period"),
        ("failures=1.5,tcp:80", "'1.5' is no whole number"),
    ],
)
def test_what_is_no_probe_is_refused_with_what_would_be(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        specs.probe(text, "--liveness-probe")


def test_a_wrong_rule_for_a_node_without_nats_is_refused() -> None:
    with pytest.raises(UsageError, match="'soon' is no number"):
        pod_spec(None, PodFlags(on_disconnect="stop:soon"), ContainerFlags())
    with pytest.raises(UsageError) as caught:
        pod_spec(None, PodFlags(on_disconnect="reboot:60"), ContainerFlags())
    assert fields(caught.value) == {"on_disconnect.action"}


def test_limits_to_change_are_those_given_and_none_lifts_one() -> None:
    made = specs.limits(cpus="0.5", cpu_shares=None, mem_limit_mib="none", pids_limit="9")
    assert made.model_dump(exclude_unset=True) == {
        "cpu_quota_us": 50_000,
        "cpu_period_us": 100_000,
        "mem_limit_mib": None,
        "pids_limit": 9,
    }
    for wrong in ({"pids_limit": "many"}, {"mem_limit_mib": "1"}, {}):
        given: dict[str, str | None] = dict.fromkeys(("cpus", "cpu_shares", "mem_limit_mib", "pids_limit"))
        with pytest.raises(UsageError):
            specs.limits(**{**given, **wrong})


def test_volumes_as_docker_and_podman_have_them():
    texts = ("/srv/www:/www:ro", "data/sub:/data", "/srv/my data:/x")
    flags = ContainerFlags(image="busybox", mounts=texts, tmpfs=("/tmp:size=1m,noexec", "/run/x"))
    spec = pod_spec(
        {"volumes": []}, PodFlags(volumes=texts, sockets=("/srv/a.sock:a", "/srv/b.sock:b:connect")), flags
    )
    first, second = spec.volumes
    assert (first.host_path, first.read_only, second.host_path) == ("/srv/www", True, "/srv/my data")
    assert first.mount_tag.startswith("v-www-")
    assert second.mount_tag.startswith("v-my_data-")
    mounts = [(m.type, m.source, m.destination, m.options) for m in spec.containers[0].mounts]
    assert mounts == [
        ("bind", first.mount_tag, "/www", ("ro",)),
        ("bind", "data/sub", "/data", ()),
        ("bind", second.mount_tag, "/x", ()),
        ("tmpfs", None, "/tmp", ("size=1m", "noexec")),
        ("tmpfs", None, "/run/x", ()),
    ]
    assert [(s.name, s.host_path, s.mode) for s in spec.sockets] == [
        ("a", "/srv/a.sock", "listen"),
        ("b", "/srv/b.sock", "connect"),
    ]


@pytest.mark.parametrize("text", ["/srv", ":/x", "/srv:x", "data:"])
def test_a_volume_that_is_none_is_explained(text):
    with pytest.raises(UsageError, match="SOURCE:/DESTINATION"):
        pod_spec(None, PodFlags(), ContainerFlags(image="busybox", mounts=(text,)))
