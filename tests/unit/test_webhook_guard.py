import json
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from laneway.errors import WebhookUrlRefused
from laneway.settings import Settings
from laneway.webhooks.guard import BLOCKED_PORTS, MAX_URL_CHARACTERS, Policy, check_url, classify

URLS = json.loads((Path(__file__).parents[1] / "data" / "webhook_urls.json").read_text())
REFUSED = [(url, reason) for reason, urls in URLS["refused"].items() for url in urls]
REFUSED.append(("https://example.com/" + "a" * 2100, "too_long"))
METADATA = (
    "169.254.169.254",
    "169.254.170.2",
    "169.254.170.23",
    "168.63.129.16",
    "100.100.100.200",
    "192.0.0.192",
    "fd00:ec2::254",
    "fd00:ec2::23",
    "fd20:ce::254",
    "::ffff:169.254.169.254",
    "::169.254.169.254",
    "::ffff:0:169.254.169.254",
    "64:ff9b::169.254.169.254",
    "64:ff9b:1::a9fe:a9fe",
    "2002:a9fe:a9fe::",
)
EVERYTHING = Policy(allow_http=True, ports=None, networks=(ip_network("0.0.0.0/0"), ip_network("::/0")))
CLOSED = Policy()
LOOPBACK = Policy(allow_http=True, networks=(ip_network("127.0.0.0/8"),))


def refusal(url: str, policy: Policy = CLOSED) -> dict[str, object]:
    with pytest.raises(WebhookUrlRefused) as refused:
        check_url(url, policy)
    assert refused.value.facts["setting"] is None or refused.value.facts["setting"] in str(refused.value)
    return refused.value.facts


def test_there_are_147_bad_and_13_good_urls() -> None:
    assert (len(REFUSED), len(URLS["passed"])) == (147, 13)


@pytest.mark.parametrize(("url", "reason"), REFUSED, ids=lambda value: ascii(value)[:60])
def test_a_bad_url_is_refused_for_its_reason(url: str, reason: str) -> None:
    assert refusal(url)["reason"] == reason


@pytest.mark.parametrize("url", URLS["passed"], ids=ascii)
def test_a_good_url_passes_and_its_canonical_form_is_stable(url: str) -> None:
    target = check_url(url, CLOSED)
    assert target.url.isascii()
    assert check_url(target.url, CLOSED) == target


def test_one_target_has_one_spelling() -> None:
    spellings = ("https://b\u00fccher.example", "HTTPS://XN--BCHER-KVA.example.:443/")
    assert {check_url(url, CLOSED).url for url in spellings} == {"https://xn--bcher-kva.example/"}
    target = check_url("https://[2606:4700:4700:0::1111]:8443/\u00e9?\u00fc", CLOSED)
    assert target.url == "https://[2606:4700:4700::1111]:8443/%C3%A9?%C3%BC"
    assert (target.host, target.port) == ("2606:4700:4700::1111", 8443)


def test_a_url_may_have_2048_characters_and_not_one_more() -> None:
    url = "https://example.com/".ljust(MAX_URL_CHARACTERS, "a")
    assert check_url(url, CLOSED).url == url
    assert refusal(url + "a")["reason"] == "too_long"
    assert refusal(url[:-1] + "\u00fc")["reason"] == "too_long"  # %C3%BC is what would be stored


@pytest.mark.parametrize(
    ("url", "setting"),
    [
        ("http://example.com/", "LANEWAY_WEBHOOK_ALLOW_HTTP"),
        ("https://10.0.0.1/", "LANEWAY_WEBHOOK_ALLOWED_CIDRS"),
        ("https://[::1]/", "LANEWAY_WEBHOOK_ALLOWED_CIDRS"),
        ("https://redis/", "LANEWAY_WEBHOOK_ALLOWED_HOSTS"),
        ("https://hooks.internal/", "LANEWAY_WEBHOOK_ALLOWED_HOSTS"),
        ("https://example.com:9000/", "LANEWAY_WEBHOOK_ALLOWED_PORTS"),
        ("https://example.com:6379/", None),
        ("https://169.254.169.254/", None),
        ("https://[::ffff:10.0.0.1]/", None),
        ("ftp://example.com/", None),
    ],
)
def test_a_refusal_names_the_setting_that_would_allow_it(url: str, setting: str | None) -> None:
    assert refusal(url)["setting"] == setting


def test_the_named_setting_does_allow_it() -> None:
    policy = Policy(
        allow_http=True,
        ports=frozenset({443, 81}),
        networks=(ip_network("10.0.0.0/8"), ip_network("::1/128")),
        hosts=frozenset({"redis", "hooks.internal"}),
    )
    for url in (
        "http://example.com/",
        "https://10.0.0.1/",
        "https://[::1]/",
        "https://redis/",
        "https://HOOKS.internal./",
        "https://example.com:81/",
    ):
        check_url(url, policy)


@pytest.mark.parametrize("address", METADATA)
def test_a_metadata_service_stays_closed_whatever_is_allowed(address: str) -> None:
    assert classify(address, EVERYTHING) is not None
    literal = f"[{address}]" if ":" in address else address
    assert refusal(f"http://{literal}/", EVERYTHING) == {"reason": "address", "setting": None}


def test_the_neighbour_of_a_metadata_service_can_be_allowed() -> None:
    assert classify("169.254.169.253", EVERYTHING) is None
    assert classify("fd00:ec2::255", EVERYTHING) is None


def test_an_allowed_network_opens_nothing_beside_it() -> None:
    assert check_url("http://127.0.0.1:9000/", LOOPBACK).port == 9000
    assert refusal("http://10.0.0.1/", LOOPBACK)["reason"] == "address"
    assert refusal("http://[::1]/", LOOPBACK)["reason"] == "address"
    assert refusal("http://[::ffff:127.0.0.1]/", LOOPBACK)["reason"] == "address"
    assert refusal("http://127.1:9000/", LOOPBACK)["reason"] == "bad_address"
    assert classify("::ffff:8.8.8.8", EVERYTHING) is not None  # IPv4 is judged as IPv4 or not at all


def test_an_opened_target_may_use_ports_from_1024_up_but_no_known_service() -> None:
    for host in ("127.0.0.1", "receiver"):
        policy = Policy(allow_http=True, networks=LOOPBACK.networks, hosts=frozenset({"receiver"}))
        check_url(f"http://{host}:1024/", policy)
        check_url(f"http://{host}:65535/", policy)
        assert refusal(f"http://{host}:1023/", policy)["reason"] == "port"
        for port in BLOCKED_PORTS:
            assert refusal(f"http://{host}:{port}/", policy)["reason"] == "port"


def test_a_star_opens_every_port_but_those_of_known_services() -> None:
    policy = Policy(ports=None)
    check_url("https://example.com:81/", policy)
    assert {refusal(f"https://example.com:{port}/", policy)["reason"] for port in (22, 25, 6379, 0)} == {
        "port"
    }


def test_this_service_does_not_call_itself() -> None:
    own = Policy.from_settings(Settings(public_url="https://jobs.example.com/"))
    assert refusal("https://jobs.example.com/api/v1/jobs", own)["reason"] == "loop"
    check_url("https://jobs.example.com:8443/", own)
    open_own = Settings(public_url="https://jobs.example.com", webhook_allowed_hosts=("jobs.example.com",))
    check_url("https://jobs.example.com/", Policy.from_settings(open_own))


def test_settings_become_a_policy() -> None:
    settings = Settings(
        webhook_allow_http=True,
        webhook_allowed_ports=("443", "9000"),
        webhook_allowed_cidrs=("10.0.0.0/8",),
        webhook_allowed_hosts=("Hooks.LAN.",),
    )
    assert Policy.from_settings(settings) == Policy(
        True, frozenset({443, 9000}), (ip_network("10.0.0.0/8"),), frozenset({"hooks.lan"})
    )
    assert Policy.from_settings(Settings(webhook_allowed_ports=("*",))).ports is None


@pytest.mark.parametrize("port", ["https", "0", "65536", "-1", "\u0664\u0664\u0663"])
def test_a_port_that_is_none_is_an_error_that_names_the_variable(port: str) -> None:
    with pytest.raises(ValueError, match="LANEWAY_WEBHOOK_ALLOWED_PORTS"):
        Policy.from_settings(Settings(webhook_allowed_ports=(port,)))


@given(st.text(max_size=80).map("https://".__add__) | st.text(max_size=80))
def test_any_text_is_a_target_or_a_refusal(text: str) -> None:
    try:
        target = check_url(text, CLOSED)
    except WebhookUrlRefused:
        return
    assert target.url.isascii()
    assert check_url(target.url, CLOSED) == target


@given(st.ip_addresses(v=4))
def test_what_passes_is_public_ipv4(address: object) -> None:
    ip = ip_address(str(address))
    if classify(ip, CLOSED) is None:
        assert ip.is_global
        assert not ip.is_multicast
