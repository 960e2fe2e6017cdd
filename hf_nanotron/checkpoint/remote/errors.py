"""What the errors of a store mean, and which of them no waiting repairs."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Kind:
    """A kind of error.

    Attributes:
        says: what to do about it.
        lasts: whether it is refused when a run starts, instead of being tried again for a while. While a run goes on,
            everything is tried again: somebody may repair it.
    """

    says: str = ""
    lasts: bool = True


OUTAGE = Kind(lasts=False)
CREDENTIALS = Kind(
    "the credentials are wrong or have expired: renew them where the protocol's package looks for them, for S3 the "
    "environment, ~/.aws or a role; a running job picks up renewed files and roles"
)
FORBIDDEN = Kind(
    "the credentials are wrong, have expired or lack permissions: writing checkpoints requires list, read, write and "
    "delete permissions there"
)
PERMISSION = Kind(
    "the credentials lack permissions: writing checkpoints requires list, read, write and delete permissions there"
)
MISSING = Kind("there is no such bucket: create it, or correct the URL")
CLOCK = Kind("the clock of this machine differs from that of the store: correct it")
REGION = Kind("the bucket is in another region or behind another endpoint: set the region and the endpoint")
FULL = Kind("the disk is full or read-only")
NO_STORE = Kind("checkpoints cannot be stored there")

CODES: dict[str, Kind] = {
    **dict.fromkeys(
        (
            "ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired", "InvalidToken",
            "InvalidAccessKeyId", "InvalidClientTokenId", "UnrecognizedClientException", "SignatureDoesNotMatch",
            "AuthFailure", "CredentialsNotSupported", "InvalidSecurity", "NotSignedUp", "401",
            "400",  # without a word, as S3 answers a HEAD with an expired token
        ),
        CREDENTIALS,
    ),
    "403": FORBIDDEN,  # without a word, for the same reason
    **dict.fromkeys(("AccessDenied", "AllAccessDisabled", "AccountProblem"), PERMISSION),
    **dict.fromkeys(("NoSuchBucket", "InvalidBucketName"), MISSING),
    "RequestTimeTooSkewed": CLOCK,
    **dict.fromkeys(
        ("PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"), REGION
    ),
}  # fmt: skip

# By class, where packages have one of their own: of botocore, google-auth, gcsfs, azure-core and paramiko.
CLASSES: dict[str, Kind] = {
    **dict.fromkeys(
        (
            "NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "TokenRetrievalError",
            "UnauthorizedSSOTokenError", "SSOTokenLoadError", "ProfileNotFound", "RefreshError",
            "DefaultCredentialsError", "ClientAuthenticationError", "AuthenticationException",
            "BadAuthenticationType", "PasswordRequiredException",
        ),
        CREDENTIALS,
    ),
    "NoRegionError": REGION,
    **dict.fromkeys(("NotImplementedError", "TypeError", "ParamValidationError", "ImportError"), NO_STORE),
}  # fmt: skip

# By what they say, where neither tells: the FTP server's answer, and what a Hadoop client needs on this machine.
WORDS: dict[str, Kind] = {
    "530 ": CREDENTIALS,
    "Unable to load libjvm": NO_STORE,
    "Unable to load libhdfs": NO_STORE,
    "bucket does not exist": MISSING,
}


class StoreError(ValueError):
    """A store cannot be used. The message names its URL and the reason, without passwords."""

    def __init__(self, message: str, kind: Kind = OUTAGE) -> None:
        super().__init__(message)
        self.kind = kind


def kind_of(error: BaseException) -> Kind:
    """What an error of a store is about; `OUTAGE` if nothing says otherwise."""
    chain = list(_chain(error))
    for each in chain:
        if isinstance(each, StoreError):
            return each.kind
    for code in map(_code, chain):
        if code in CODES:
            return CODES[code]
    for each in chain:
        if (kind := CLASSES.get(type(each).__name__)) is not None:
            return kind
    for each in chain:
        for words, kind in WORDS.items():
            if words in str(each):
                return kind
        if isinstance(each, OSError) and each.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            return FULL
        if isinstance(each, PermissionError):
            return FORBIDDEN if _code(each) else PERMISSION
    return OUTAGE


def reason(error: BaseException) -> str:
    """An error in words: its class, what it says, and what to do about it."""
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    says = kind_of(error).says
    return f"{text} ({says})" if says and not isinstance(error, StoreError) else text


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _code(error: BaseException) -> str | None:
    """The store's own name for the error: S3's code, or the status of HTTP."""
    response: Any = getattr(error, "response", None)
    if isinstance(response, dict):
        return str(response.get("Error", {}).get("Code"))
    # Others call their own numbers a code: aiohttp has a code of 400 for an answer that is cut off.
    holders = [(error, "status"), (error, "status_code"), (response, "status_code")]
    for holder, name in [(error, "code"), *holders] if type(error).__name__ == "HttpError" else holders:
        if isinstance(value := getattr(holder, name, None), int | str):
            return str(value)
    return None
