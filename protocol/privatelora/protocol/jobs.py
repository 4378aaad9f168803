"""What a job is on both ends: its parameters, checked where it is queued and where it runs, and a report of numbers.

A kind of job declares two structs. `checked_params` reads what an operator asked for; `checked_report` is called by the
device before it reports and by the control plane before it keeps the report, so that nothing but a few bounded numbers
can cross: no tensor, no list, no text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from privatelora.protocol.errors import ConfigurationError, ProtocolError

MAX_REPORT_NUMBERS = 32
MAX_REPORT_BYTES = 4096  # of its JSON


@dataclass(frozen=True)
class JobKind:
    """A kind of job.

    Parameters
    ----------
    name : as operators and policies write it, such as `finetune-round`.
    params : struct of its parameters, each bounded, with defaults; unknown fields are forbidden.
    report : struct of numbers, each bounded.
    """

    name: str
    params: type[msgspec.Struct]
    report: type[msgspec.Struct]

    def __post_init__(self) -> None:
        for struct in (self.params, self.report):
            if not struct.__struct_config__.forbid_unknown_fields:
                raise ValueError(f"{struct.__name__} of {self.name} must forbid unknown fields")


def checked_params(kind: JobKind, params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters, with defaults for what is left out; raises `ConfigurationError` naming the field."""
    try:
        found = msgspec.convert(dict(params), kind.params)
    except (msgspec.ValidationError, RecursionError) as error:
        raise ConfigurationError(f"parameters of {kind.name} are not valid: {error}") from None
    plain: dict[str, Any] = msgspec.to_builtins(found)
    return plain


def checked_report(kind: JobKind, report: Mapping[str, Any]) -> dict[str, int | float]:
    """The report, if it holds numbers of this kind within their bounds and nothing else; raises `ProtocolError`."""
    if len(report) > MAX_REPORT_NUMBERS:
        raise ProtocolError(f"a report of {len(report)} numbers is over the limit of {MAX_REPORT_NUMBERS}")
    for name, value in report.items():
        if not isinstance(name, str) or isinstance(value, bool) or not isinstance(value, int | float):
            raise ProtocolError(f"{str(name)[:40]} of the report is no number; a report holds numbers only")
        if not math.isfinite(value):
            raise ProtocolError(f"{name[:40]} of the report is {value}; a report holds finite numbers only")
    try:
        found = msgspec.convert(dict(report), kind.report)
    except msgspec.ValidationError as error:
        raise ProtocolError(f"the report of {kind.name} is not valid: {error}") from None
    numbers: dict[str, int | float] = {
        name: value for name, value in msgspec.to_builtins(found).items() if value is not None
    }
    if len(msgspec.json.encode(numbers)) > MAX_REPORT_BYTES:
        raise ProtocolError(f"the report is longer than {MAX_REPORT_BYTES} bytes")
    return numbers
