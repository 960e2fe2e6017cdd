"""What is never written, logged or printed: tokens, passwords and keys, found by names, in URLs, and by their shape.

Imports nothing of this package, so that everything can import it. Errs on the side of hiding too much.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any
from urllib.parse import unquote

MASK = "***"
LEAST = 6  # characters of a secret that is looked for in other texts

# Words of a name; `api_key`, `apiKey`, `X-Api-Key` and `APIKey` have the same.
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_SECRET_WORDS = frozenset(
    "password passwords passwd passphrase secret secrets credential credentials authorization apikey".split()
)
_SECRET_LAST_WORDS = frozenset("pwd signature sig sas jwt cookie".split())
# Before `key`, these make it a secret; a key of its own is one, too, as s3fs names its access key.
_SECRET_KEYS = frozenset("access account api auth encryption license private secret service shared signing ssh".split())
# A `key` of its own that names a column or a metric, such as `eval_loss`, or a number of one; access keys are longer.
_PLAIN_KEY = re.compile(r"[a-z]{1,8}|[a-z]+(_[a-z]+)+|\d{1,8}")
# Before `token`, these make it one of a tokenizer; all other tokens are secrets.
_TOKENIZER = frozenset(
    "additional assistant audio begin bos boi cls decoder each end eoi eos fim first forced image last mask new next "
    "num pad per sep special start stop suppress think unk user video word".split()
)

# Tokens that can be told by their first characters: Hugging Face, GitHub, GitLab, OpenAI and alike, AWS, Google, Slack,
# JSON web tokens, private keys.
_SHAPES = re.compile(
    r"\bhf_[A-Za-z0-9]{20,}|\bapi_org_[A-Za-z0-9]{20,}|\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}"
    r"|\bglpat-[\w-]{16,}|\bsk-[\w-]{20,}|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|\bAIza[\w-]{35}|\bxox[abprs]-[\w-]{10,}"
    r"|\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*|\bBearer\s+[^\s'\"]+"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----(?:.*?-----END [A-Z ]*PRIVATE KEY-----|.*)",
    re.DOTALL,
)
# Where what stands before an @ without a colon is a user or a container, not a token.
_WITH_USERS = frozenset("sftp ssh smb ftp hdfs webhdfs abfs abfss az".split())
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*://")
_URL = re.compile(_SCHEME.pattern + r"[^\s'\"<>]*")
_CHAIN = re.compile(r"::(?=[A-Za-z][A-Za-z0-9+.\-]*(?:://|$|::))")
# `name=value`, `name: value`, `'name': 'value'`, `--name value`.
_PAIR = re.compile(
    r"(?P<name>[A-Za-z][\w.\-]*)(?P<between>['\"]?\s*[=:]\s*)(?P<value>\"[^\"]*\"|'[^']*'|[^\s,;&)}\]]+)"
)
_OPTION = re.compile(r"(?P<name>--?[A-Za-z][\w.\-]*)(?P<between>['\"]?,?\s+['\"]?)(?P<value>[^\s'\"]+)")


def is_secret(name: str) -> bool:
    """Whether a field, key, option or query parameter of this name holds a secret."""
    words = [word.lower() for word in _WORD.findall(name)]
    if not words:
        return False
    *before, last = words
    after = dict(zip(words, words[1:], strict=False))  # of each word, the next one
    if _SECRET_WORDS & set(words) or last in _SECRET_LAST_WORDS or "connection_string" in "_".join(words):
        return True
    if last in ("key", "keys") and (before[-1] in _SECRET_KEYS if before else last == "key"):
        return True
    if last == "token":
        return not before or before[-1] not in _TOKENIZER
    return after.get("access") == "key"  # `aws_access_key_id`


def printable_url(url: str) -> str:
    """`url` without password and the values of its query: `sftp://me:secret@host/run` is `sftp://***@host/run`.

    The parts of a chain (`simplecache::s3://...`) are treated alike.
    """
    return "::".join(map(_without_credentials, _CHAIN.split(url)))


def _without_credentials(url: str) -> str:
    protocol, separator, rest = url.partition("://")
    if not separator:
        return re.sub(r"^[^/@]*:.*@", f"{MASK}@", url, flags=re.DOTALL)
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    before, at, after = rest.rpartition("@")
    start = f"{protocol}://"
    if at and ":" not in authority and before == authority[: len(before)] and protocol in _WITH_USERS:
        start, rest = f"{start}{before}@", after
    elif at and (":" in authority or "@" in authority):
        if re.search(r"[?#]", before):  # in a password, or an @ in a query
            return f"{start}{MASK}"
        start, rest = f"{start}{MASK}@", after
    elif (port := authority.rpartition("]")[2].rpartition(":")[2]) != authority and not port.isdigit() and port:
        return f"{start}{MASK}"  # the first part of a URL that a space in its password has cut
    path, question, query = rest.partition("?")
    if question:
        parts = (part.partition("=") for part in re.split("[&;]", query))
        return f"{start}{path}?{'&'.join(f'{name}={MASK}' if equals else MASK for name, equals, _ in parts)}"
    path, hash_, fragment = path.partition("#")
    return f"{start}{path}{hash_}{MASK if '=' in fragment else fragment}"


def credentials_in(url: str) -> list[str]:
    """What `printable_url` hides of `url`, as libraries may print it: the password and values of the query."""
    found: list[str] = []
    for part in _CHAIN.split(url):
        rest = part.partition("://")[2] or part
        if printable_url(part) == part:
            continue
        before, at, _ = rest.rpartition("@")
        if at and (":" in before or part.partition("://")[0] not in _WITH_USERS):
            user, colon, password = before.partition(":")
            found += [before, password if colon else user]
        values = re.split("[&;#]", rest.partition("?")[2] or rest.partition("#")[2])
        found += [value if equals else name for name, equals, value in (pair.partition("=") for pair in values)]
    return [text for each in dict.fromkeys(found) for text in dict.fromkeys((each, unquote(each))) if text]


def printable(text: str, known: Iterable[str] = ()) -> str:
    """`text`, such as a message, with what looks like a secret replaced by `***`.

    Args:
        known: secrets that are hidden wherever they stand, such as `credentials_in(url)`.
    """
    text = hide(text, known)
    text = _URL.sub(lambda found: printable_url(found[0]), text)
    text = _SHAPES.sub(MASK, text)
    return _hide_values(_OPTION, _hide_values(_PAIR, text))


def _hide_values(pattern: re.Pattern[str], text: str) -> str:
    """Like `sub`, but what is the value of a plain name may be the name of a secret."""
    parts, place = [], 0
    while found := pattern.search(text, place):
        hidden = _hide_value(found)
        end = found.start("value") if hidden is None else found.end()
        parts += [text[place : found.start()], text[found.start() : end] if hidden is None else hidden]
        place = end
    return "".join([*parts, text[place:]])


def _hide_value(found: re.Match[str]) -> str | None:
    name, value = found["name"], found["value"]
    # "key: a", "token: b" and "--key value" are words of messages, more often than not.
    is_word = name == "--key" or name in ("key", "token") and not found["between"].startswith(("'", '"'))
    if not is_secret(name) or is_word or value.strip("'\"") in ("", "None", MASK, "true", "false"):
        return None
    quote = value[0] if value[0] in "'\"" and value[-1] == value[0] else ""
    return f"{name}{found['between']}{quote}{MASK}{quote}"


def shown(name: str, value: Any) -> str:
    """The value of a field for a message: its `repr` without secrets, and not too long."""
    text = repr(redacted(name, value))
    return text if len(text) <= 200 else f"{text[:197]}..."


def redacted(name: str, value: Any, mask: Any = MASK, known: Iterable[str] = ()) -> Any:
    """The value of a field as it may be written: itself if it holds no secret, else a copy without.

    Args:
        name: of the field. A secret's value becomes `mask`; values that say nothing (None, True, "") stay.
        value: of any type. Texts, mappings, lists, tuples, sets and dataclasses are looked through.
        known: as for `printable`.
    """
    known = tuple(known)
    # No secret is a fraction: a metric may have such a name.
    if value is None or isinstance(value, float) or (isinstance(value, bool | int) and not is_secret(name)):
        return value
    if name == "key" and isinstance(value, str | int) and _PLAIN_KEY.fullmatch(str(value)):
        return value
    if is_secret(name) and not isinstance(value, bool):
        return mask if value or value == 0 else value
    if isinstance(value, bytes):
        text = value.decode("utf-8", "replace")
        return value if _redacted_text(text, known) == text else mask
    if isinstance(value, str | os.PathLike):
        text = _redacted_text(plain := str(value), known)
        return value if text == plain else text
    return _redacted_parts(value, mask, known)


def holds_secret(value: Any, name: str = "", known: Iterable[str] = ()) -> bool:
    """Whether what is to be written holds a secret. Unlike what is hidden, a short word in the query of a URL
    (`?download=true`, `?v=2`) is none.

    Args:
        value: as for `redacted`.
        name: of the field.
        known: as for `printable`.
    """
    known = tuple(known)
    if isinstance(value, Mapping):
        return any(holds_secret(item, str(key), known) for key, item in value.items())
    if isinstance(value, list | tuple):
        return any(holds_secret(item, name, known) for item in value)
    if isinstance(value, str) and not is_secret(name):
        value = _URL.sub(lambda found: _without_plain_query(found[0]), value)
    return redacted(name, value, known=known) is not value


def _without_plain_query(url: str) -> str:
    start, _, query = url.partition("?")
    pairs = [part.partition("=") for part in re.split("[&;]", query)]
    left = [
        f"{name}{equals}{value}"
        for name, equals, value in pairs
        if is_secret(name) or len(value) >= LEAST or not re.fullmatch(r"[\w.\-]+", f"{name}{value}") or not equals
    ]
    return "?".join([start, *(["&".join(left)] if left and query else [])])


def hide(text: str, known: Iterable[str]) -> str:
    """`text` without these secrets."""
    for secret in sorted({each for each in known if each}, key=len, reverse=True):
        text = text.replace(secret, MASK)
    return text


def _redacted_text(text: str, known: tuple[str, ...]) -> str:
    text = hide(text, known)
    # One URL alone may have spaces and quotes in its password, which end a URL within a text.
    return printable(printable_url(text) if _SCHEME.match(text) or _CHAIN.search(text) else text)


def _redacted_parts(value: Any, mask: Any, known: tuple[str, ...]) -> Any:
    if isinstance(value, Mapping):
        parts = {key: redacted(str(key), item, mask, known) for key, item in value.items()}
        same = all(parts[key] is item for key, item in value.items())
        return value if same else parts if type(value) is dict else _like(value, parts)
    if isinstance(value, list | tuple | set | frozenset):
        items = [redacted("", item, mask, known) for item in value]
        same = all(new is old for new, old in zip(items, value, strict=True))
        return value if same else _like(value, items)
    if is_dataclass(value) and not isinstance(value, type):
        changed = {
            entry.name: new
            for entry in fields(value)
            if (new := redacted(entry.name, old := getattr(value, entry.name, None), mask, known)) is not old
        }
        if changed:
            value = copy.copy(value)
            for key, new in changed.items():
                object.__setattr__(value, key, new)
    return value


def _like(value: Any, parts: Any) -> Any:
    try:
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    except Exception:  # a class with a constructor of its own
        return parts if isinstance(parts, dict) else list(parts)


def secrets_of(values: Mapping[str, Any], least: int = LEAST) -> Iterator[str]:
    """The secrets that fields hold, as texts to look for in other fields (see `printable`'s `known`).

    Args:
        values: of the fields, by their names.
        least: characters; shorter texts are found everywhere.
    """
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from secrets_of({str(key): item for key, item in value.items()}, least)
        elif isinstance(value, str):
            found = [value] if is_secret(name) else credentials_in(value)
            # A path is where a secret lies.
            yield from (text for text in found if len(text) >= least and not text.startswith(("/", "~")))
