"""The demo's report: `Report`, whose fields are the keys of report.json, and its page report.html.

From: `demo.py`, which measured every number. To: files that open anywhere; the page holds its picture and its style.
"""

from __future__ import annotations

import base64
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from privatelora.protocol.errors import ConfigurationError

# DESIGN section 4, in the words that the project uses everywhere.
PRIVACY = (
    "M, the optimizer's state, the raw data and the sampled text never leave the device as such, and nothing that the "
    "service stores (logs, caches, crash dumps) holds a tensor, a prompt or a token. Other users see nothing, and "
    "neither does the network where the connection is TLS. But the operator's running process CAN reconstruct text "
    "from activations: nearest neighbour recovers 100% of tokens from uploaded embeddings, a trained decoder 98% after "
    "one device layer and 76% after sixteen, and the gradient of the last hidden states gives away 100% of the labels. "
    "M is not sent either, but an inline linear M can be fitted from one long prompt, since the operator computes u "
    "and receives v. Device-held first layers, clipping and noise lower this by measured amounts. So trusting the "
    "operator, or an attested enclave, is a requirement."
)


@dataclass(frozen=True)
class Answer:
    """One question with the word that a right answer holds, and what the model said before and after."""

    question: str
    expected: str
    before: str
    after: str


@dataclass(frozen=True)
class Report:
    """What one demo measured.

    Losses are nats per labelled token over the answers, payload is tensor bytes of the exchanges, expected payload is
    the formula of DESIGN section 3 for the same passes, and reductions are shares (0..1) of the per-layer exchange.
    """

    model: str
    adapter_kind: str
    m_kind: str
    placement: str
    rank_down: int
    rank_up: int
    loss_before: float
    loss_after: float
    heldout_tokens: int
    answers: list[Answer]
    answers_right_before: int
    answers_right_after: int
    m_parameters: int
    train_tokens: int
    train_tokens_per_s: float
    generate_tokens_per_s: float
    payload_bytes_up: int
    payload_bytes_down: int
    expected_payload_bytes_up: int
    expected_payload_bytes_down: int
    frame_overhead_bytes: int
    reduction_vs_device_lora: float
    reduction_by_shape: dict[str, dict[str, float]]
    seconds: float


def write_report(report: Report, inline_layers: int, curve: Path, folder: Path) -> None:
    """Write report.json and report.html beside the loss curve; raises `ConfigurationError` where that cannot be."""
    picture = base64.b64encode(curve.read_bytes()).decode()
    environment = Environment(
        loader=PackageLoader("privatelora.platform", "."),
        autoescape=select_autoescape(["html", "j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.j2").render(
        report=report, inline_layers=inline_layers, picture=picture, privacy=PRIVACY
    )
    try:
        (folder / "report.json").write_text(json.dumps(asdict(report), indent=2, ensure_ascii=False) + "\n", "utf-8")
        (folder / "report.html").write_text(page, "utf-8")
    except OSError as error:
        raise ConfigurationError(f"the report cannot be written ({error}); choose another --output") from None
