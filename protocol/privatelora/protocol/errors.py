"""The one tree of errors, raised by every part of privatelora and carried over the wire by its codes.

    PrivateLoraError
    ├── ConfigurationError          a setting or an argument cannot be used
    │   └── UnsupportedModelError   this model's mathematics is not implemented
    ├── DataError                   local data cannot be used for training
    ├── StoreError                  the local store cannot be read or written
    ├── BudgetError                 a time or byte budget is spent
    ├── AuthenticationError         the token is missing, wrong or not allowed this
    ├── AdmissionError              the service has no room now (`retry_after_s`)
    │   └── QuotaError              an allowance is spent until it resets (`retry_after_s`)
    ├── SessionEndedError           the operator ended the session
    ├── IncompatibleError           versions, model or adapter set do not fit together
    ├── ConnectionLostError         the service cannot be reached, or went away
    ├── ProtocolError               a frame broke the rules of the wire
    └── ServiceError                the service failed at its own work

A message says what happened, with the values, and what to do next. `error_from_code` turns the code of an ERROR frame
or of a JSON reply back into the class that the other end raised.
"""

from __future__ import annotations


class PrivateLoraError(Exception):
    """Root of every error that privatelora raises on purpose."""

    code = "error"

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after_s = retry_after_s


class ConfigurationError(PrivateLoraError):
    """A setting or an argument cannot be used."""

    code = "configuration"


class UnsupportedModelError(ConfigurationError):
    """The model needs mathematics that this decoder does not implement."""

    code = "unsupported_model"


class DataError(PrivateLoraError):
    """Local data cannot be used for training."""

    code = "data"


class StoreError(PrivateLoraError):
    """The local store cannot be read or written."""

    code = "store"


class BudgetError(PrivateLoraError):
    """A time or byte budget is spent."""

    code = "budget"


class AuthenticationError(PrivateLoraError):
    """The token is missing, wrong, or not allowed to do this."""

    code = "authentication"


class AdmissionError(PrivateLoraError):
    """The service has no room for this now; `retry_after_s` says when to ask again."""

    code = "admission"


class QuotaError(AdmissionError):
    """An allowance of the caller's plan, team, user or key is spent; `retry_after_s` says when it resets."""

    code = "quota"


class SessionEndedError(PrivateLoraError):
    """The operator ended the session on purpose; what the device had finished is kept."""

    code = "session_ended"


class IncompatibleError(PrivateLoraError):
    """Protocol versions, model or adapter set do not fit together."""

    code = "incompatible"


class ConnectionLostError(PrivateLoraError):
    """The service cannot be reached, or the connection to it ended."""

    code = "connection_lost"


class ProtocolError(PrivateLoraError):
    """A frame broke the rules of the wire; the session that sent it is closed."""

    code = "protocol"


class ServiceError(PrivateLoraError):
    """The service failed at its own work."""

    code = "service"


_BY_CODE: dict[str, type[PrivateLoraError]] = {
    cls.code: cls
    for cls in (
        ConfigurationError,
        UnsupportedModelError,
        DataError,
        StoreError,
        BudgetError,
        AuthenticationError,
        AdmissionError,
        QuotaError,
        SessionEndedError,
        IncompatibleError,
        ConnectionLostError,
        ProtocolError,
        ServiceError,
    )
}


def error_from_code(code: str, message: str, retry_after_s: float | None = None) -> PrivateLoraError:
    """Return the error that the other end raised; an unknown code becomes a `ServiceError` that names it."""
    cls = _BY_CODE.get(code)
    if cls is None:
        return ServiceError(f"{message} (unknown code {code!r}; is the service newer than this device?)")
    return cls(message, retry_after_s=retry_after_s)
