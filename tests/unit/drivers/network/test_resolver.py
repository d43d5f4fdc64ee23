import pytest

from vcnode.drivers.network import resolver
from vcnode.models.network import DnsConfig

HOSTS_OWN = """
# a comment
nameserver 127.0.0.53
nameserver 192.0.2.53
nameserver fe80::1%eth0
nameserver nonsense
nameserver 2001:db8::53
nameserver 192.0.2.54
nameserver 192.0.2.55
search example.net corp.example
"""


def test_servers_that_a_pod_can_reach_are_taken_from_the_host():
    found = resolver.parse(HOSTS_OWN)
    assert found.servers == ("192.0.2.53", "2001:db8::53", "192.0.2.54")
    assert found.search == ("example.net", "corp.example")


@pytest.mark.parametrize(
    ("asked", "of_node", "servers", "search"),
    [
        (DnsConfig(servers=("10.0.0.1",)), ("10.0.0.2",), ("10.0.0.1",), ()),
        (DnsConfig(), ("10.0.0.2",), ("10.0.0.2",), ()),
        (DnsConfig(), (), ("192.0.2.53", "2001:db8::53", "192.0.2.54"), ("example.net", "corp.example")),
        (DnsConfig(search=("x",)), (), ("192.0.2.53", "2001:db8::53", "192.0.2.54"), ("x",)),
    ],
    ids=["asked for", "of the node", "of the host", "of the host, with domains of its own"],
)
def test_what_was_asked_for_comes_first(monkeypatch, tmp_path, asked, of_node, servers, search):
    (tmp_path / "resolv.conf").write_text(HOSTS_OWN)
    monkeypatch.setattr(resolver, "RESOLV_CONF", (tmp_path / "absent", tmp_path / "resolv.conf"))
    found = resolver.complete(asked, of_node)
    assert (found.servers, found.search) == (servers, search)


def test_a_host_without_servers_gives_none(monkeypatch, tmp_path):
    monkeypatch.setattr(resolver, "RESOLV_CONF", (tmp_path / "absent",))
    assert resolver.complete(DnsConfig(), ()) == DnsConfig()
