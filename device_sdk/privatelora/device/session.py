"""`DeviceSession`: a frozen model that someone else holds, adapted by what this device keeps.

    me.finetune(data) -> training.local_round -> forward_backward, optim_step      (the verbs, public as well)
    me.generate(text) -> prefill, then a token a pass -> generation.pieces

The passes themselves are `split.SplitModel`'s. Each is run by `replay.Replay`, which meets a lost connection: it
reconnects and does the pass again from what the device still has, the batch or the token history.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import torch
from flwr.common import RecordDict
from transformers import PreTrainedTokenizerBase

from privatelora.device.adapters import Adapter
from privatelora.device.batch import Batch
from privatelora.device.connection import OnWait
from privatelora.device.data import Dataset, Example, LocalData, chat_renderer, load_examples
from privatelora.device.data_rows import ChatRow, checked_messages
from privatelora.device.exchange import RemoteLayers
from privatelora.device.generation import Sampler, pieces
from privatelora.device.installation import installation_of
from privatelora.device.model import DeviceModel, end_tokens, load_tokenizer
from privatelora.device.options import Options, resolve
from privatelora.device.replay import OnQuota, Replay
from privatelora.device.service import Service
from privatelora.device.split import LossFn, SplitModel
from privatelora.device.state import IDENTITY, Identity, adapter_state, restore
from privatelora.device.store import Seal, Store, read_state, write_state
from privatelora.device.training import Callback, FinetuneReport, finetune
from privatelora.protocol import local
from privatelora.protocol.errors import ConfigurationError, DataError
from privatelora.protocol.placement import Placement

Prompt = str | Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class StepResult:
    """Loss of one batch (mean nats a labelled token, or what `loss_fn` gave), and its tokens."""

    loss: float
    tokens: int
    labelled_tokens: int


@dataclass(frozen=True)
class Evaluation:
    """Mean loss in nats a labelled token over a data set."""

    loss: float
    tokens: int
    examples: int


class DeviceSession:
    """One device's session with a service.

    Parameters
    ----------
    server : base URL, https:// off this machine.
    token : bearer token; else PRIVATELORA_TOKEN, else the 0600 file of an embedded service on this machine.
    name : of the adapter in the local store; one that exists is loaded, with the settings it was made with.
    placement : a name (`paper`, `few-trips`, `one-trip`), a text that `Placement.parse` reads, or a `Placement`.
    adapter, rank : kind of the service's set, and r_down = r_up, or the two.
    m_kind, m_hidden, lora_rank, lora_alpha, seed : see `AdapterSettings`.
    wire_dtype : element type of what crosses; the model's own by default.
    passphrase : encrypts the local store.
    allow_plain : permit http:// to another machine.
    micro_batches : how many a training or scoring batch is cut into, so that one is computed while another's exchange
        travels; None is one for every 512 tokens or so. Loss and gradients are the whole batch's, to rounding.
    retry_s : how long to go on reconnecting before `ConnectionLostError` is raised.
    on_wait : called with place and number waiting while the service has no room yet; what it raises ends the wait.
    on_quota : called with the `QuotaError` before `finetune` waits for a quota to reset.
    """

    def __init__(
        self,
        server: str,
        *,
        token: str | None = None,
        name: str = "default",
        placement: str | Placement | None = None,
        adapter: str | None = None,
        rank: int | tuple[int, int] | None = None,
        m_kind: str | None = None,
        m_hidden: int | None = None,
        lora_rank: int | None = None,
        lora_alpha: float | None = None,
        seed: int | None = None,
        wire_dtype: str | None = None,
        store_dir: str | Path | None = None,
        passphrase: str | None = None,
        cache_dir: str | Path | None = None,
        allow_plain: bool = False,
        ca_file: str | Path | None = None,
        micro_batches: int | None = None,
        timeout_s: float = 60.0,
        retry_s: float = 60.0,
        on_wait: OnWait | None = None,
        on_quota: OnQuota | None = None,
    ) -> None:
        if micro_batches is not None and micro_batches < 1:
            raise ConfigurationError(f"micro_batches {micro_batches} must be 1 or more, or None")
        options = Options(placement, adapter, rank, m_kind, m_hidden, lora_rank, lora_alpha, seed, wire_dtype)
        self.service = Service(
            server, token, allow_plain=allow_plain, ca_file=ca_file, cache_dir=cache_dir, timeout_s=timeout_s
        )
        self.store = Store(Path(store_dir) if store_dir else local.store_dir(), name, passphrase)
        try:
            saved = self.store.read()
            identity = Identity.from_record(saved.config_records[IDENTITY]) if saved else None
            found = resolve(options, self.service.info, identity)
            self.identity, wire = found.identity, found.wire_dtype
            self.placement, self.settings = self.identity.placement, self.identity.settings
            self.model = DeviceModel(self.service, self.placement)
            self.config = self.model.config
            self.adapter = Adapter(self.config, self.placement, self.settings)
            self.optimizer = torch.optim.AdamW(list(self.adapter.parameters()) or [torch.zeros(())], weight_decay=0.0)
            self.remote = RemoteLayers(
                self.service,
                self.placement,
                self.settings,
                self.identity.set_hash,
                wire,
                self.model.dtype,
                on_wait,
                installation_of(self.store.path.parent),
            )
            self.replay = Replay(self.remote, retry_s)
            self.replay.on_quota = on_quota or self.replay.on_quota
            self.split = SplitModel(self.model, self.remote, self.adapter, micro_batches)
            self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(self.service)
            self._end_tokens = end_tokens(self.config.hf, self.tokenizer)
            self.progress: dict[str, Any] = {}
            if saved:
                self.load_state(saved)
        except BaseException:
            self.store.close()
            self.service.close()
            raise

    # -- life ---------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the session; the adapter stays in the local store as it was last saved."""
        self.remote.disconnect()
        self.service.close()
        self.store.close()

    # -- the main jobs ------------------------------------------------------------------------------------------------

    def finetune(
        self,
        local_data: LocalData | Dataset,
        *,
        epochs: int = 3,
        learning_rate: float | None = None,
        batch_size: int = 4,
        validation: LocalData | Dataset | None = None,
        callbacks: Sequence[Callback] = (),
        loss_fn: LossFn | None = None,
        warmup_steps: int = 10,
        clip_norm: float = 1.0,
        patience: int | None = None,
        max_seconds: float | None = None,
        max_bytes: int | None = None,
        seed: int = 0,
        resume: bool = False,
        on_quota: Literal["stop", "wait"] = "stop",
    ) -> FinetuneReport:
        """Train M and the device's LoRA on local data, which never leaves; each step is saved in the local store.

        Parameters
        ----------
        local_data : see `data.load_examples`: strings, prompt/completion or chat rows, a file, or a datasets.Dataset.
        learning_rate : peak, after `warmup_steps` and before a cosine to zero; by rank where not given.
        validation : held-out data, evaluated after each epoch; with `patience`, training stops after that many epochs
            without a better loss and the best adapter is kept.
        callbacks : called with a `StepRecord` after each step; one that returns True stops the training.
        loss_fn : any torch function of logits (n_o, vocab) and labels (n_o,); cross-entropy by default.
        max_seconds, max_bytes : budgets; what was trained when one is spent is kept, and `resume=True` goes on.
        resume : go on from the last step of the same fine-tune that was cut off.
        on_quota : where an allowance of the service is spent, `stop` (the report says when it resets, and resume=True
            goes on) or `wait` until then; either way no finished step is lost.

        Raises
        ------
        DataError, ConfigurationError, ConnectionLostError, IncompatibleError : each says what to do next.
        """
        if on_quota not in ("stop", "wait"):
            raise ConfigurationError(f"on_quota {on_quota!r} must be stop or wait")
        return finetune(
            self,
            local_data,
            validation,
            callbacks,
            loss_fn,
            resume,
            epochs=epochs,
            learning_rate=learning_rate,
            batch_size=batch_size,
            warmup_steps=warmup_steps,
            clip_norm=clip_norm,
            patience=patience,
            max_seconds=max_seconds,
            max_bytes=max_bytes,
            seed=seed,
            wait_for_quota=on_quota == "wait",
        )

    def evaluate(self, local_data: LocalData | Dataset, *, batch_size: int = 8) -> Evaluation:
        """Mean loss over local data, without training."""
        data = self.examples(local_data)
        total, labelled = 0.0, 0
        for batch in Batch.packed(data.examples, batch_size, self.service.info.limits.max_tokens_per_step):
            total += self.replay.run(partial(self.split.score, batch))
            labelled += len(batch.rows)
        return Evaluation(total / labelled, labelled, len(data.examples))

    def generate(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stop: Sequence[str] = (),
        seed: int | None = None,
    ) -> str:
        """Continue a text, or answer a chat (`[{"role": "user", "content": ...}]`); greedy at temperature 0."""
        return "".join(
            self.stream(
                prompt, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, stop=stop, seed=seed
            )
        )

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stop: Sequence[str] = (),
        seed: int | None = None,
    ) -> Iterator[str]:
        """`generate`, piece by piece as the text grows."""
        sampler, stops = Sampler(temperature, top_p, seed), [stop] if isinstance(stop, str) else list(stop)
        if max_new_tokens < 1 or "" in stops:
            raise ConfigurationError(f"max_new_tokens {max_new_tokens} must be 1 or more, and no stop string empty")
        return pieces(self._generate_tokens(self.encode(prompt), max_new_tokens, sampler), self.tokenizer, stops)

    async def afinetune(self, local_data: LocalData | Dataset, **options: Any) -> FinetuneReport:
        """`finetune` on a worker thread."""
        return await asyncio.to_thread(self.finetune, local_data, **options)

    async def agenerate(self, prompt: Prompt, **options: Any) -> str:
        """`generate` on a worker thread."""
        return await asyncio.to_thread(self.generate, prompt, **options)

    async def astream(self, prompt: Prompt, **options: Any) -> AsyncIterator[str]:
        """`stream` with each piece made on a worker thread."""
        stream = self.stream(prompt, **options)
        while (piece := await asyncio.to_thread(next, stream, None)) is not None:
            yield piece

    # -- the verbs beneath --------------------------------------------------------------------------------------------

    def examples(self, local_data: LocalData | Dataset) -> Dataset:
        """Local data as token sequences of at most the model's context (and the service's largest step)."""
        if isinstance(local_data, Dataset):
            return local_data
        limit = min(self.config.context_length, self.service.info.limits.max_tokens_per_step)
        return load_examples(local_data, self.tokenizer, limit)

    def forward_backward(self, examples: Sequence[Example], loss_fn: LossFn | None = None) -> StepResult:
        """Loss and gradients of one batch; the gradients are added to `parameter.grad` once the whole pass is done."""
        if not any(True for _ in self.adapter.parameters()):
            raise ConfigurationError(
                "this placement trains nothing; choose one with inline layers or trained device layers"
            )
        batch = Batch.of(examples)
        limit = self.service.info.limits.max_tokens_per_step
        if len(batch.tokens) > limit:
            raise ConfigurationError(
                f"a batch of {len(batch.tokens)} tokens is over this service's limit of {limit}; use a smaller "
                "batch_size"
            )
        loss, gradients = self.replay.run(lambda: self.split.forward_backward(batch, loss_fn))
        for name, parameter in self.adapter.named_parameters():
            gradient = gradients[name]
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        return StepResult(loss, len(batch.tokens), len(batch.rows))

    def optim_step(self, learning_rate: float, clip_norm: float | None = 1.0) -> float:
        """One AdamW step on the accumulated gradients, clipped to a total norm; returns the norm before clipping."""
        if not 0 <= learning_rate < math.inf or (clip_norm is not None and not clip_norm > 0):
            raise ConfigurationError(
                f"learning_rate {learning_rate} must be a finite number of 0 or more, and clip_norm {clip_norm} above 0"
            )
        parameters = list(self.adapter.parameters())
        norm = torch.nn.utils.clip_grad_norm_(parameters, clip_norm if clip_norm is not None else float("inf"))
        if not torch.isfinite(norm):
            self.optimizer.zero_grad()
            raise DataError("the gradient is not finite, so this step was not taken; lower the learning rate")
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(norm)

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a text, or of a chat with the model's template and its opening of the answer."""
        if not prompt:
            raise DataError("the prompt is empty; write at least one word")
        if isinstance(prompt, str):
            ids = list(self.tokenizer(prompt)["input_ids"])
        else:
            if not self.tokenizer.chat_template:
                raise ConfigurationError("this model has no chat template; pass the prompt as a string")
            chat = ChatRow("the prompt", checked_messages("the prompt", prompt))
            text = chat_renderer(chat, self.tokenizer)(len(chat.messages), True)
            ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        if len(ids) >= self.config.context_length:
            raise DataError(
                f"the prompt has {len(ids)} tokens, which leaves no room in a context of {self.config.context_length}; "
                "shorten it"
            )
        return ids

    # -- saving -------------------------------------------------------------------------------------------------------

    def state(self) -> RecordDict:
        """The adapter, the optimizer's moments and the progress as a Flower RecordDict (copies)."""
        state = adapter_state(self.adapter, self.optimizer, self.identity)
        state.config_records["progress"].update(self.progress)
        return state

    def load_state(self, state: RecordDict) -> None:
        """Take over a RecordDict that `state` made; raises `IncompatibleError` for another model, set or shape."""
        self.identity.require(Identity.from_record(state.config_records[IDENTITY]))
        self.progress = dict(state.config_records["progress"])
        restore(state, self.adapter, self.optimizer, int(self.progress.get("step", 0)))

    def checkpoint(self) -> None:
        """Write the state to the local store, atomically."""
        self.store.write(self.state())

    def save(self, path: str | Path, passphrase: str | None = None) -> None:
        """Write the adapter to a file of its own, readable by its owner only."""
        write_state(Path(path), self.state(), Seal(passphrase) if passphrase is not None else None)

    def load(self, path: str | Path, passphrase: str | None = None) -> None:
        """Read an adapter that `save` wrote for the same model, set and settings, and keep it in the local store."""
        self.load_state(read_state(Path(path), Seal(passphrase) if passphrase is not None else None))
        self.checkpoint()

    def export_peft(self, directory: str | Path) -> None:
        """Write the adapter as PEFT's files, for the whole model anywhere; linear M and device-held LoRA only."""
        from privatelora.device.export import export_peft

        export_peft(self, Path(directory))

    # -- replay --------------------------------------------------------------------------------------------------------

    def _generate_tokens(self, history: list[int], max_new_tokens: int, sampler: Sampler) -> Iterator[int]:
        """New tokens, one a pass; `history` is all that a replay needs."""
        room = self.config.context_length - len(history)
        decoding = self.split.decode(history)
        try:
            for _ in range(min(max_new_tokens, room)):
                token = sampler.pick(self.replay.run(decoding.next_logits, decoding.restart))
                if token in self._end_tokens:
                    return
                history.append(token)
                yield token
        finally:
            decoding.close()
            self.replay.release([decoding.sequence])
