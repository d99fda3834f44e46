"""Personal data and secrets in text: found by form, confirmed by check digit or structure, replaced by a placeholder.

Where a kind has a checksum (Chinese ID, credit card, IBAN) it decides; so order numbers and dates stay as they are.
Names and postal addresses have no form: finding those needs a model, which is not what this file does.
"""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date

# Digits and letters beside a match, or a decimal point, would make it part of something longer; Chinese characters do not.
_END = r"(?![0-9A-Za-z])(?!\.[0-9])"


def _begin(characters: str, *, forbidden: str = "0-9A-Za-z") -> str:
    """A first character that nothing forbidden precedes. The class stands first because `re` then skips fast to it."""
    return rf"{characters}(?<![{forbidden}]{characters})(?<![0-9]\.{characters})"


@dataclass(frozen=True, slots=True)
class Finding:
    """A stretch of text, text[start:end], and the kind of personal data it is."""

    kind: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of personal data: what it looks like, and what confirms it."""

    name: str
    pattern: re.Pattern[str]
    confirm: Callable[[str], bool]
    gate: re.Pattern[str] | tuple[str, ...]  # a faster search, or lower-case strings, without which nothing can match


def find(text: str) -> list[Finding]:
    """All personal data in `text`, in order of place, without overlaps (an earlier kind of KINDS wins)."""
    lowered = text.lower()
    open_gates = {gate for gate in _GATES if _passes(gate, text, lowered)}
    findings: list[Finding] = []
    for kind in KINDS:
        if kind.gate in open_gates:
            for match in kind.pattern.finditer(text):
                start, end = match.span("it") if "it" in kind.pattern.groupindex else match.span()
                if kind.confirm(text[start:end]):
                    findings.append(Finding(kind.name, start, end))
    return _without_overlaps(findings, len(text))


def scrub(text: str) -> tuple[str, Counter[str]]:
    """`text` with each finding replaced by its placeholder (`<EMAIL>`, ...), and how many of each kind there were."""
    findings = find(text)
    if not findings:
        return text, Counter()
    parts, at = [], 0
    for finding in findings:
        parts += [text[at : finding.start], f"<{finding.kind}>"]
        at = finding.end
    return "".join(parts) + text[at:], Counter(finding.kind for finding in findings)


# What confirms a match ----------------------------------------------------------------------------------------------


def luhn(digits: str) -> bool:
    """Whether a string of digits passes the Luhn check of payment cards (ISO/IEC 7812-1, annex B)."""
    total = 0
    for place, digit in enumerate(reversed(digits)):
        value = int(digit) * (1 + place % 2)
        total += value - 9 if value > 9 else value
    return total % 10 == 0


def chinese_id(number: str) -> bool:
    """Whether 18 characters are a Chinese citizen ID number: a real birth date and the check digit of GB 11643-1999."""
    if not re.fullmatch(r"[1-9][0-9]{16}[0-9Xx]", number):
        return False
    try:
        born = date(int(number[6:10]), int(number[10:12]), int(number[12:14]))
    except ValueError:
        return False
    weighted = sum(int(digit) * pow(2, 17 - place, 11) for place, digit in enumerate(number[:17]))
    return 1850 <= born.year <= 2100 and "10X98765432"[weighted % 11] == number[17].upper()


def iban(number: str) -> bool:
    """Whether a string is an IBAN: its country's length, and 1 modulo 97 after ISO 13616 rearranges it."""
    compact = number.replace(" ", "")
    if len(compact) != _IBAN_LENGTHS.get(compact[:2]):
        return False
    return int("".join(str(int(character, 36)) for character in compact[4:] + compact[:4])) % 97 == 1


def _card(number: str) -> bool:
    digits = re.sub(r"[ -]", "", number)
    known_issuer = digits[0] in "3456" or 2221 <= int(digits[:4]) <= 2720
    return 13 <= len(digits) <= 19 and known_issuer and len(set(digits)) > 1 and luhn(digits)


def _ipv4(address: str) -> bool:
    octets = address.split(".")
    return all(int(octet) <= 255 and (octet == "0" or octet[0] != "0") for octet in octets)


def _ipv6(address: str) -> bool:
    # "a::b" is valid IPv6 and also C++; an address that identifies anyone has a longer group and a digit.
    groups = address.split(":")
    if len(groups) < 8 and (not _DIGIT.search(address) or max(map(len, groups)) < 3):
        return False
    try:
        ipaddress.IPv6Address(address)
    except ValueError:
        return False
    return True


def _phone(number: str) -> bool:
    return not _DECIMAL.fullmatch(number) and 7 <= sum(character in "0123456789" for character in number) <= 15


def _secret(value: str) -> bool:
    """A value behind "password =" and the like counts when it mixes letters and digits, as words do not."""
    return _DIGIT.search(value) is not None and any(character.isalpha() for character in value)


def _always(_: str) -> bool:
    return True


# The kinds, the more certain ones first -----------------------------------------------------------------------------

_DIGIT = re.compile("[0-9]")
_DECIMAL = re.compile(r"\+?[0-9]+\.[0-9]+")
_SEVEN_DIGITS = re.compile(r"[0-9](?:[ ().-]{0,2}[0-9]){6}")

# Length of an IBAN by country (SWIFT IBAN registry).
_IBAN_LENGTHS = {
    country: int(length)
    for length, countries in {
        "15": "NO",
        "16": "BE",
        "18": "DK FI FO GL NL SD FK",
        "19": "MK SI",
        "20": "AT BA EE KZ LT LU XK MN",
        "21": "CH CR HR LI LV",
        "22": "BG BH DE GB GE IE ME RS VA",
        "23": "AE GI IL IQ TL OM SO",
        "24": "AD CZ ES MD PK RO SA SE SK TN VG",
        "25": "LY PT ST",
        "26": "IS TR",
        "27": "BI DJ FR GR IT MC MR SM",
        "28": "AL AZ BY CY DO GT HU LB NI PL SV",
        "29": "BR EG PS QA UA",
        "30": "JO KW MU",
        "31": "MT SC",
        "32": "LC",
        "33": "RU",
    }.items()
    for country in countries.split()
}

_IBANS = "|".join(rf"{country}[0-9]{{2}}(?: ?[0-9A-Z]){{{length - 4}}}" for country, length in _IBAN_LENGTHS.items())

# In one piece, or as printed: 4-4-4-4(-3), American Express 4-6-5, Diners Club 4-6-4.
# What follows the first digit.
_CARDS = (
    r"[0-9]{12,18}|[0-9]{3}(?:[ -][0-9]{4}){3}(?:[ -][0-9]{1,3}(?![0-9/]))?|(?<=3)[0-9]{3}[ -][0-9]{6}[ -][0-9]{4,5}"
)

# What follows the first character, which is +, 0 or 8 of the country code, or the 1 of the number.
_CHINESE_MOBILE = (
    r"(?:(?<=\+)86[ -]?1|(?<=0)086[ -]?1|(?<=8)6[ -]?1|(?<=1))[3-9][0-9](?:[0-9]{8}|[ -][0-9]{4}[ -][0-9]{4})"
)

_TOKENS = "|".join(
    (
        r"(?:AKIA|ASIA)[0-9A-Z]{16}",  # AWS
        r"gh[pousr]_[0-9A-Za-z]{36,}",  # GitHub
        r"github_pat_[0-9A-Za-z_]{50,}",
        r"glpat-[0-9A-Za-z_-]{20,}",  # GitLab
        r"sk-(?:ant-|proj-)?[0-9A-Za-z_-]{20,}",  # OpenAI, Anthropic, DeepSeek
        r"[sr]k_(?:live|test)_[0-9A-Za-z]{16,}",  # Stripe
        r"xox[abeprs]-[0-9A-Za-z-]{10,}",  # Slack
        r"AIza[0-9A-Za-z_-]{35}",  # Google
        r"hf_[0-9A-Za-z]{30,}",  # Hugging Face
        r"npm_[0-9A-Za-z]{36}",
        r"pypi-[0-9A-Za-z_-]{50,}",
        r"LTAI[0-9A-Za-z]{12,30}",  # Alibaba Cloud
        r"eyJ[0-9A-Za-z_-]{10,}\.eyJ[0-9A-Za-z_-]{10,}\.[0-9A-Za-z_-]{10,}",  # JSON web token
    )
)

KINDS = (
    Kind(
        "SECRET",
        re.compile(
            r"-----BEGIN (?:[A-Z]+ ){0,3}PRIVATE KEY-----[^-]{0,20000}(?:-----END (?:[A-Z]+ ){0,3}PRIVATE KEY-----)?"
        ),
        _always,
        gate=("private key-----",),
    ),
    Kind(
        "SECRET",
        re.compile(rf"(?<![0-9A-Za-z])(?:{_TOKENS})(?![0-9A-Za-z_])"),
        _always,
        gate=(
            *(
                "akia",
                "asia",
                "ghp_",
                "gho_",
                "ghu_",
                "ghs_",
                "ghr_",
                "github_pat_",
                "glpat-",
                "sk-",
                "sk_live_",
                "sk_test_",
            ),
            *("rk_live_", "rk_test_", "xox", "aiza", "hf_", "npm_", "pypi-", "ltai", "eyj"),
        ),
    ),
    Kind(
        "SECRET",
        re.compile(
            r"(?i:api[_-]?key|secret|token|passw(?:or)?d|pwd|密码|密钥)[\"']?[ \t]{0,3}[:=：][ \t]{0,3}[\"']?"
            r"(?P<it>[0-9A-Za-z_+/.~!@#$%^&*-]{8,200})"
        ),
        _secret,
        gate=("apikey", "api_key", "api-key", "secret", "token", "password", "passwd", "pwd", "密码", "密钥"),
    ),
    Kind(
        "EMAIL",
        re.compile(
            r"(?<![0-9A-Za-z._%+-])[0-9A-Za-z_%+-][0-9A-Za-z._%+-]{0,63}@(?:[0-9A-Za-z](?:[0-9A-Za-z-]{0,61}[0-9A-Za-z])?\.){1,8}"
            r"[A-Za-z]{2,24}(?![0-9A-Za-z])"
        ),
        _always,
        gate=("@",),
    ),
    Kind(
        "IBAN",
        re.compile(rf"(?<![0-9A-Za-z])(?:{_IBANS})(?![0-9A-Za-z])"),
        iban,
        gate=re.compile("[A-Z]{2}[0-9]{2} ?[0-9A-Z]{4}"),
    ),
    Kind("ID_NUMBER", re.compile(rf"{_begin('[1-9]')}[0-9]{{16}}[0-9Xx]{_END}"), chinese_id, gate=_SEVEN_DIGITS),
    Kind("CREDIT_CARD", re.compile(rf"{_begin('[2-6]')}(?:{_CARDS}){_END}"), _card, gate=_SEVEN_DIGITS),
    Kind(
        "IP_ADDRESS",
        re.compile(rf"{_begin('[0-9]', forbidden='0-9A-Za-z.')}[0-9]{{0,2}}(?:\.[0-9]{{1,3}}){{3}}{_END}"),
        _ipv4,
        gate=re.compile(r"[0-9]\.[0-9]{1,3}\.[0-9]"),
    ),
    Kind(
        "IP_ADDRESS",
        re.compile(
            r"(?<![0-9A-Za-z:.])(?:[0-9A-Fa-f]{1,4}:|::)[0-9A-Fa-f:]{0,37}[0-9A-Fa-f](?![0-9A-Za-z])(?!:[0-9A-Fa-f])"
        ),
        _ipv6,
        gate=re.compile(":[0-9A-Fa-f]{0,4}:"),
    ),
    # Chinese mobile numbers (11 digits from 13 to 19), with or without +86 or 0086, together or 3-4-4.
    Kind(
        "PHONE",
        re.compile(rf"{_begin('[+01-9]', forbidden='0-9A-Za-z+')}{_CHINESE_MOBILE}{_END}"),
        _always,
        gate=_SEVEN_DIGITS,
    ),
    # Chinese landlines: 010-62345678, 0571 8765 4321.
    Kind(
        "PHONE",
        re.compile(rf"{_begin('0')}[1-9][0-9]{{1,2}}[ -][2-9][0-9]{{2,3}}[ -]?[0-9]{{4}}{_END}"),
        _phone,
        gate=_SEVEN_DIGITS,
    ),
    # International: +44 20 7946 0958, +1 (202) 555-0147.
    Kind("PHONE", re.compile(rf"\+(?<![0-9A-Za-z+]\+)[1-9](?:[ .-]?\(?[0-9]\)?){{6,14}}{_END}"), _phone, gate=("+",)),
    # North American: (202) 555-0147, 202-555-0147, 1-202-555-0147, 202.555.0147.
    Kind(
        "PHONE",
        re.compile(
            rf"{_begin('[(12-9]', forbidden='0-9A-Za-z(+-')}(?:(?<=1)[ .-]\(?[2-9][0-9]{{2}}|(?<=\()[2-9][0-9]{{2}}|(?<=[2-9])[0-9]{{2}})"
            rf"(?:\) ?|[.-])[2-9][0-9]{{2}}[ .-][0-9]{{4}}{_END}"
        ),
        _phone,
        gate=_SEVEN_DIGITS,
    ),
)

_GATES = tuple({kind.gate: None for kind in KINDS})


def _passes(gate: re.Pattern[str] | tuple[str, ...], text: str, lowered: str) -> bool:
    if isinstance(gate, tuple):
        return any(needed in lowered for needed in gate)
    return gate.search(text) is not None


def _without_overlaps(findings: list[Finding], length: int) -> list[Finding]:
    """Keep what no earlier, surer finding covers, in order of place."""
    if len(findings) < 2:
        return findings
    covered = bytearray(length)
    kept = []
    for finding in findings:
        if 1 not in covered[finding.start : finding.end]:
            covered[finding.start : finding.end] = b"\1" * (finding.end - finding.start)
            kept.append(finding)
    return sorted(kept, key=lambda finding: finding.start)
