"""Masking: addresses are found, lookalikes stay, and a mask is not an address."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm.data.cleaning.personal_data import MaskCounts, mask


def masked(text: str) -> str:
    return mask(text, MaskCounts(), emails=True, ip_addresses=True)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Write to jane.doe+x@mail.example.co.uk.", "Write to [email]."),
        ("<a@b.de>,c_d@e-f.org", "<[email]>,[email]"),
        ("a@b and @name and a@b.c and x@1.2", "a@b and @name and a@b.c and x@1.2"),
        ("dns 8.8.8.8, 1.1.1.1:53/x", "dns [ip], [ip]:53/x"),
        ("10.0.0.1 127.0.0.1 192.168.1.1 172.20.0.1", "10.0.0.1 127.0.0.1 192.168.1.1 172.20.0.1"),
        ("v1.2.3.4 1.2.3.4.5 999.1.1.1 08.8.8.8", "v1.2.3.4 1.2.3.4.5 999.1.1.1 08.8.8.8"),
        ("2001:4860:4860::8888 and 2606:4700::1", "[ip] and [ip]"),
        ("fe80::1 ::1 std::vector 12:30:45 abc::def", "fe80::1 ::1 std::vector 12:30:45 abc::def"),
    ],
)  # fmt: skip
def test_addresses_are_masked_and_nothing_else(text: str, expected: str) -> None:
    assert masked(text) == expected


def test_masks_are_counted_and_each_kind_is_a_choice() -> None:
    count, text = MaskCounts(), "a@b.de 8.8.8.8 c@d.fr"
    assert mask(text, count, emails=True, ip_addresses=False) == "[email] 8.8.8.8 [email]"
    assert mask(text, count, emails=False, ip_addresses=True) == "a@b.de [ip] c@d.fr"
    assert (count.num_emails, count.num_ip_addresses) == (2, 1)


PIECES = ["a@b.de", "@", "8.8.8.8", ".9", "2001:db8::1", ":", "x", "1", " ", "[ip]", "a" * 70, "-"]


@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join) | st.text())
def test_a_second_time_changes_nothing(text: str) -> None:
    once, again = masked(text), MaskCounts()
    assert mask(once, again, emails=True, ip_addresses=True) == once
    assert again == MaskCounts()


@pytest.mark.parametrize("piece", ["a", "a.", "@", "a@", "1.", "2000:", "a@a.", "1.1.1.1."])
def test_long_runs_that_are_no_address_end_and_stay(piece: str) -> None:
    text = piece * (1_000_000 // len(piece))
    assert masked(text) == text  # quadratic time would be hours
