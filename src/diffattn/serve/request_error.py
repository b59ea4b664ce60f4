"""The errors that a client is answered with, in the words of OpenAI's interface."""

from __future__ import annotations

import reprlib

from diffattn.errors import DiffattnError


class RequestError(DiffattnError):
    """An answer that is an error: its HTTP status, and OpenAI's ``message``, ``param`` and ``code``.

    Args:
        given, wanted, way_out: the three parts of the message, as of every error of this package.
        status: the status of HTTP.
        param: the field of the request that is wrong, where it is one.
        code: OpenAI's name of the error, where it has one.
    """

    def __init__(
        self,
        given: str,
        wanted: str,
        way_out: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        # A client may have sent half a surrogate pair, which no answer can hold.
        super().__init__(*(sendable(" ".join(part.split())) for part in (given, wanted, way_out)))
        self.status = status
        self.body = {
            "error": {
                "message": str(self),
                "type": "invalid_request_error" if status < 500 else "server_error",
                "param": None if param is None else sendable(param),
                "code": code,
            }
        }

    @property
    def headers(self) -> dict[str, str] | None:
        """The headers of the answer, where it has some of its own."""
        return {"www-authenticate": "Bearer"} if self.status == 401 else None


def wrong_field(param: str, value: object, wanted: str, way_out: str | None = None) -> RequestError:
    """Returns the error of a field whose value is another than is wanted."""
    short = reprlib.Repr()
    short.maxlevel, short.maxstring = 3, 80
    way_out = way_out or f"correct {param}, or leave it out"
    return RequestError(f"{param} is {short.repr(value)}", wanted, way_out, param=param)


def stopping() -> RequestError:
    """Returns the error of every request that a server which is told to stop cannot answer any more."""
    return RequestError("the server is stopping", "one that runs", "send the request again later", status=503)


def sendable(text: str) -> str:
    """Returns the text with half a surrogate pair, which no answer can hold, written as its number."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def check_text(value: str, param: str) -> str:
    """Returns the text, unless it holds half a surrogate pair, which is no character.

    Raises:
        RequestError: status 400.
    """
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(
            f"character {error.start} of {param} is half a surrogate pair", "text", "send whole characters"
        ) from None
    return value
