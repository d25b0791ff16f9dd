"""Mask e-mail and public IP addresses. The masks are not addresses, so masking is idempotent."""

import re
from dataclasses import dataclass
from ipaddress import AddressValueError, IPv4Address, IPv4Network, IPv6Address, IPv6Network

EMAIL_MASK, IP_MASK = "[email]", "[ip]"
# Repeats are bounded as in RFC 5321 and start at the beginning of a run, so time stays linear. The
# last lookahead keeps the text after a mask from forming another address with it.
EMAIL = re.compile(
    r"(?<![\w.%+-])[\w.%+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,63}(?![\w.%+-]{0,64}@)",
    re.ASCII,
)
# The digit before the lookbehind: a search for a digit is ten times as fast
IPV4 = re.compile(r"[0-9](?<![\w.].)[0-9]{0,2}\.(?:[0-9]{1,3}\.){2}[0-9]{1,3}(?!\.?\w)", re.ASCII)
IPV6 = re.compile(r"[23](?<![\w:.].)[0-9a-fA-F]{3}:[0-9a-fA-F:]{2,34}(?![\w:])", re.ASCII)
PUBLIC_IPV6 = IPv6Network("2000::/3")
NOT_PUBLIC_IPV4 = tuple(  # IANA's special-purpose registry and multicast
    map(
        IPv4Network,
        (
            "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16",
            "172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24", "192.168.0.0/16", "198.18.0.0/15",
            "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/3",
        ),
    )
)  # fmt: skip
"""Listed here because the standard library's own list differs between releases."""


@dataclass(kw_only=True, slots=True)
class MaskCounts:
    """How many addresses were masked."""

    num_emails: int = 0
    num_ip_addresses: int = 0


def mask(text: str, masked: MaskCounts, *, emails: bool, ip_addresses: bool) -> str:
    """Return `text` with the addresses masked, and count them in `masked`."""
    if emails and "@" in text:
        text, num_found = EMAIL.subn(EMAIL_MASK, text)
        masked.num_emails += num_found
    if ip_addresses:
        for pattern, is_public in ((IPV4, _is_public_ipv4), (IPV6, _is_public_ipv6)):
            parts, start = list[str](), 0
            for match in pattern.finditer(text):
                if is_public(match.group()):
                    parts += [text[start : match.start()], IP_MASK]
                    start = match.end()
                    masked.num_ip_addresses += 1
            text = "".join([*parts, text[start:]])
    return text


def _is_public_ipv4(text: str) -> bool:
    try:
        address = IPv4Address(text)
    except AddressValueError:
        return False
    return not any(address in network for network in NOT_PUBLIC_IPV4)


def _is_public_ipv6(text: str) -> bool:
    try:
        return IPv6Address(text) in PUBLIC_IPV6
    except AddressValueError:
        return False
