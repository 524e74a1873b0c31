"""The guard at the socket: names are looked up here, and nothing is dialled that `classify` refuses.

The address that was judged is the address that is dialled: no second look-up stands between the two
(DNS rebinding). The URL keeps its name, so SNI, the Host header and the certificate check stay right.
"""

from __future__ import annotations

import asyncio
import socket
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult

from laneway.webhooks.guard import ALLOWED_CIDRS, Policy, classify

DNS_THREADS = 64
STUCK_THREADS = 8  # past it, names whose server did not answer last time are not asked for
REMEMBERED_NAMES = 1000
DNS_TIMEOUT_SECONDS = 2.0

GetAddrInfo = Callable[..., list[Any]]
"""`socket.getaddrinfo`, or what a test puts in its place."""


class AddressRefused(OSError):
    """The guard refused an address. An OSError, which is what aiohttp passes on as `os_error`."""


class GuardResolver(AbstractResolver):
    """Looks names up in threads of its own; a name with one refused address is refused whole.

    Its own threads: in asyncio's default pool, a few slow nameservers hold up every other look-up. A look-up
    that is given up holds its thread until the system gives up too, so names known to be slow share a few.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        timeout_seconds: float = DNS_TIMEOUT_SECONDS,
        getaddrinfo: GetAddrInfo = socket.getaddrinfo,
    ) -> None:
        self._policy = policy
        self._timeout_seconds = timeout_seconds
        self._getaddrinfo = getaddrinfo
        self._stuck: list[Future[list[Any]]] = []  # look-ups that were given up and still hold a thread
        self._slow: OrderedDict[str, None] = OrderedDict()
        self._threads = ThreadPoolExecutor(DNS_THREADS, thread_name_prefix="laneway-dns")

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """The addresses of `host`, all of which may be dialled.

        Raises AddressRefused when one may not, OSError when the name does not resolve in time.
        """
        self._stuck = [each for each in self._stuck if not each.done()]
        if host in self._slow and len(self._stuck) >= STUCK_THREADS:
            raise OSError("the name server did not answer in time, and others do not either")
        look_up = self._threads.submit(self._getaddrinfo, host, port, family=family, type=socket.SOCK_STREAM)
        try:
            async with asyncio.timeout(self._timeout_seconds):
                answers = await asyncio.wrap_future(look_up)
        except TimeoutError:
            self._stuck.append(look_up)
            self._slow[host] = None
            if len(self._slow) > REMEMBERED_NAMES:
                self._slow.popitem(last=False)
            raise OSError("the name server did not answer in time") from None
        self._slow.pop(host, None)
        results: list[ResolveResult] = []
        for answer_family, _, protocol, _, sockaddr in answers:
            if classify(sockaddr[0], self._policy) is not None:
                raise AddressRefused(f"the name resolves to an address that {ALLOWED_CIDRS} does not allow")
            results.append(
                ResolveResult(
                    hostname=host,
                    host=sockaddr[0],
                    port=port,
                    family=answer_family,
                    proto=protocol,
                    flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
                )
            )
        return results

    async def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


def guarded_session(
    policy: Policy, resolver: GuardResolver, *, connections: Mapping[str, Any], **options: Any
) -> aiohttp.ClientSession:
    """A session for URLs that somebody else chose: what it dials is judged by `policy`.

    Proxies of the environment are not used, cookies not kept, answers not decompressed; redirects are for
    each request to refuse. There is no deadline but the caller's. `connections` are options of the pool.
    """
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(
            resolver=resolver, socket_factory=socket_factory(policy), **connections
        ),
        trust_env=False,
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),
        **options,
    )


def socket_factory(policy: Policy) -> Callable[[tuple[Any, ...]], socket.socket]:
    """Makes the sockets of a connector, each only after its address was judged once more.

    The last gate, and for addresses written in the URL the only one: aiohttp asks no resolver for those.
    """

    def make(address_info: tuple[Any, ...]) -> socket.socket:
        family, kind, protocol, _, sockaddr = address_info
        if classify(sockaddr[0], policy) is not None:
            raise AddressRefused(f"an address that {ALLOWED_CIDRS} does not allow")
        return socket.socket(family, kind, protocol)

    return make
