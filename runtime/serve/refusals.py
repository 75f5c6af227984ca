"""What a client is told when something is wrong: OpenAI's error document, and the status that goes with it.

Nothing of a request is repeated in it, and it never becomes long.
"""

from typing import Any

from starlette.responses import JSONResponse

from plans.errors import ExitCode, LlamaplanError, printable

MAX_MESSAGE_CHARACTERS = 1000

_STATUS = {
    "E-CONTEXT": (400, "context_length_exceeded"),
    "E-ROOM": (400, "context_length_exceeded"),
    "E-QUEUE": (429, "queue_full"),
    "E-DRAINING": (503, "shutting_down"),
    "E-NONFINITE": (500, "not_finite"),
    "E-MASKED": (400, "nothing_left_to_choose"),
}
"""By the code of an error of ours."""
_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
RETRY_SECONDS = 1


class Refused(Exception):  # noqa: N818 - an answer, not a fault
    """A request that gets no answer, and why."""

    def __init__(self, status: int, message: str, *, code: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    @classmethod
    def of(cls, error: LlamaplanError) -> "Refused":
        """Return what an error of ours is to a client."""
        is_theirs = error.exit_code in {ExitCode.USAGE, ExitCode.BAD_INPUT}
        usual = (400, "invalid_request") if is_theirs else (503, "engine_failed")
        status, code = _STATUS.get(error.code, usual)
        return cls(status, error.line(), code=code)

    def document(self) -> dict[str, Any]:
        """Return what is sent, as an event too."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        message = printable(self, limit=MAX_MESSAGE_CHARACTERS)
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """Return the whole answer."""
        headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": str(RETRY_SECONDS)}}.get(self.status)
        return JSONResponse(self.document(), status_code=self.status, headers=headers)
