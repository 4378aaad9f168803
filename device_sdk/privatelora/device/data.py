"""Local data as token sequences for training: `load_examples`, `Dataset` and the batch order, `batches`.

From: `data_rows`, which reads what the owner has (lists, files, datasets). To: `DeviceSession.finetune` and
`local_round`, which send hidden states of `Example.tokens` through the split model and compute the loss against
`Example.labels` here. Tokens and text stay on this device; no error or warning quotes them.

    local_data -> rows -> _Sequence (tokens, which of them are learned) -> windows of the context -> Example
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import TemplateError
from numpy.typing import NDArray

from privatelora.device.data_rows import ChatRow, CompletionRow, Row, TextRow, read_rows
from privatelora.protocol.errors import ConfigurationError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE = -100  # a label that carries no loss; torch's cross_entropy ignores this value by default

Tokens = NDArray[np.int64]
LocalData = str | os.PathLike[str] | Iterable[Any]
"""a path, or rows; `load_examples` says which"""


class DataWarning(UserWarning):
    """Local data was changed on its way to the model, such as rows that were split."""


@dataclass(frozen=True, eq=False)  # eq=False: comparing arrays gives arrays; a fingerprint compares contents
class Example:
    """One sequence for the model, with what each position must predict.

    Attributes
    ----------
    tokens : (n,) int64
        Token ids, at most the context length.
    labels : (n,) int64
        Already shifted: `labels[i]` is `tokens[i + 1]` where that token is learned, else `IGNORE`. The last one is
        always `IGNORE`, at least one is not.

    Raises
    ------
    DataError
        The arrays break these rules.
    """

    tokens: Tokens
    labels: Tokens

    def __post_init__(self) -> None:
        tokens, labels = self.tokens, self.labels
        if tokens.ndim != 1 or tokens.shape != labels.shape or tokens.dtype != np.int64 or labels.dtype != np.int64:
            raise DataError(
                f"an example needs tokens and labels of one shape (n,) in int64, not {tokens.shape} {tokens.dtype} and "
                f"{labels.shape} {labels.dtype}"
            )
        learned = labels != IGNORE
        if not learned.any():
            raise DataError(f"an example of {len(tokens)} tokens has no label: leave it out")
        if learned[-1] or (labels[:-1] != tokens[1:])[learned[:-1]].any():
            raise DataError(
                "labels must be the tokens shifted by one: labels[i] is tokens[i + 1] or -100, the last -100"
            )


@dataclass(frozen=True)
class Dataset:
    """The examples of one `local_data`, in its order; `split_rows` counts the rows longer than the context."""

    examples: tuple[Example, ...]
    split_rows: int

    @property
    def tokens(self) -> int:
        """Number of tokens in all examples."""
        return sum(len(example.tokens) for example in self.examples)

    @property
    def labelled_tokens(self) -> int:
        """Number of tokens that carry loss."""
        return sum(int((example.labels != IGNORE).sum()) for example in self.examples)

    def fingerprint(self) -> str:
        """Return the hex SHA-256 of all tokens and labels, the same on every machine; `resume=True` compares it."""
        digest = hashlib.sha256()
        for example in self.examples:
            digest.update(len(example.tokens).to_bytes(8, "little"))
            digest.update(example.tokens.astype("<i8").tobytes())
            digest.update(example.labels.astype("<i8").tobytes())
        return digest.hexdigest()


def load_examples(local_data: LocalData, tokenizer: PreTrainedTokenizerBase, context_length: int) -> Dataset:
    """Turn what a device owner has into token sequences.

    Parameters
    ----------
    local_data
        A list (or another iterable that keeps its order, such as a `datasets.Dataset`) of rows of one shape, or the
        path of a file with those columns:

        - strings or `{"text": ...}`: every token is learned; an end token is added, and a start token where the
          tokenizer adds one by default;
        - `{"prompt": ..., "completion": ...}`: the completion and an end token are learned;
        - `{"messages": [{"role": ..., "content": ...}, ...]}`: the model's chat template, and every answer of the
          assistant is learned with its end-of-turn token. What follows the last answer is left out. Templates that
          print an earlier answer differently (without its reasoning, say) give one sequence for each such answer.

        Files: `.jsonl` (one row a line), `.json` (one list of rows), `.csv` (a header, commas), `.parquet`, and `.txt`,
        where every paragraph (blank lines between them) is one row of text. Text is UTF-8. Other columns are ignored.
    context_length
        The most tokens of an example. A longer row is split into consecutive windows, each of which begins with the
        last token of the one before, so that no label is lost; windows without a label are dropped. One `DataWarning`
        counts them.

    Raises
    ------
    DataError
        No rows, or a row, file, shape or chat template that cannot be used: which one, and what to do.
    ConfigurationError
        A context below 2 tokens, or a tokenizer that cannot mark the end of a text.
    """
    if context_length < 2:
        raise ConfigurationError(f"context_length is {context_length}: it must be 2 tokens or more")
    coder = _Coder.of(tokenizer)
    examples: list[Example] = []
    rows = split_rows = pieces = dropped = 0
    for row in read_rows(local_data):
        rows += 1
        sequences = _sequences(row, coder)
        for sequence in sequences:
            windows, without_label = _windows(sequence, context_length)
            examples += windows
            if len(sequence.tokens) > context_length:
                pieces += len(windows) + without_label
                dropped += without_label
        split_rows += any(len(sequence.tokens) > context_length for sequence in sequences)
    if not examples:
        raise DataError("local_data has no rows: pass at least one, and check that this is the data you meant")
    if split_rows:
        left_out = f", {dropped} of which held nothing to learn and were left out" if dropped else ""
        warnings.warn(
            f"{split_rows} of {rows} rows are longer than the context of {context_length} tokens and were split into "
            f"{pieces} pieces{left_out}; no piece sees the ones before it: shorten these rows if that matters",
            DataWarning,
            stacklevel=2,
        )
    return Dataset(tuple(examples), split_rows)


def batches(examples: Sequence[Example], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Return the shuffled indices of one epoch in batches; the last may be small.

    The order depends on the number of examples, `seed` and `epoch` alone, so that a resumed or replayed run, on this
    machine or another, takes the same steps.

    Raises
    ------
    ConfigurationError
        A batch size below 1, or a negative seed or epoch.
    """
    if batch_size < 1:
        raise ConfigurationError(f"batch_size is {batch_size}: it must be 1 or more")
    if seed < 0 or epoch < 0:
        raise ConfigurationError(f"seed is {seed} and epoch {epoch}: both must be 0 or more")
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch])))
    order: list[int] = generator.permutation(len(examples)).tolist()
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


@dataclass(frozen=True)
class _Sequence:
    """A whole row in tokens: `tokens` (n,) int64; `learned` (n,) bool says which of them must be predicted."""

    tokens: Tokens
    learned: NDArray[np.bool_]

    @classmethod
    def of(cls, where: str, tokens: list[int], learned: list[bool]) -> _Sequence:
        # Nothing after the last learned token matters to the loss, so it is neither computed nor sent.
        length = max((i + 1 for i, flag in enumerate(learned) if flag and i > 0), default=0)
        if length == 0:
            raise DataError(f"{where} gives no token to predict: write more text in it, or leave it out")
        return cls(np.asarray(tokens[:length], np.int64), np.asarray(learned[:length], np.bool_))


def _windows(sequence: _Sequence, context_length: int) -> tuple[list[Example], int]:
    """Cut a sequence into examples of at most `context_length` tokens; return them and how many had no label."""
    tokens, learned = sequence.tokens, sequence.learned  # (n,), (n,)
    labels = np.full_like(tokens, IGNORE)
    labels[:-1][learned[1:]] = tokens[1:][learned[1:]]
    windows = []
    starts = range(0, len(tokens) - 1, context_length - 1)
    for start in starts:
        part = slice(start, start + context_length)
        window_labels = labels[part].copy()
        window_labels[-1] = IGNORE  # its target is the next window's first label, or there is none
        if (window_labels != IGNORE).any():
            windows.append(Example(tokens[part].copy(), window_labels))
    return windows, len(starts) - len(windows)


@dataclass(frozen=True)
class _Coder:
    """A tokenizer and what it puts around a text: `start` (often nothing) and `end`."""

    tokenizer: PreTrainedTokenizerBase
    start: list[int]
    end: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> _Coder:
        end = tokenizer.eos_token_id
        if not isinstance(end, int):
            raise ConfigurationError(
                "the tokenizer has no end token, so the model could not learn where to stop: set tokenizer.eos_token"
            )
        plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
        full = list(tokenizer("a")["input_ids"])
        starts = (full[:i] for i in range(len(full)) if full[i : i + len(plain)] == plain)
        return cls(tokenizer, next(starts, []), end)

    def ids(self, text: str) -> list[int]:
        """Tokens of the text alone."""
        # verbose=False: a text longer than the model's maximum is no surprise here, it is split later.
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def ended(self, tokens: list[int]) -> list[int]:
        """The same tokens with the end token, unless the text wrote it out."""
        return tokens if tokens[-1:] == [self.end] else [*tokens, self.end]


def _sequences(row: Row, coder: _Coder) -> list[_Sequence]:
    if isinstance(row, TextRow):
        tokens = coder.ended(coder.start + coder.ids(row.text))
        return [_Sequence.of(row.where, tokens, [True] * len(tokens))]
    if isinstance(row, CompletionRow):
        return [_completion(row, coder)]
    return _chat(row, coder)


def _completion(row: CompletionRow, coder: _Coder) -> _Sequence:
    # Generation will see the tokens of the prompt alone, so training must too. Where the joined text starts with
    # exactly these, its other tokens are the completion (SentencePiece would put a space before a text of its own);
    # where the boundary falls inside a token ("Answer: " + "yes" has one token " yes"), the two are encoded apart.
    prompt = coder.start + coder.ids(row.prompt)
    joined = coder.start + coder.ids(row.prompt + row.completion)
    completion = joined[len(prompt) :] if joined[: len(prompt)] == prompt else coder.ids(row.completion)
    completion = coder.ended(completion)
    return _Sequence.of(row.where, prompt + completion, [False] * len(prompt) + [True] * len(completion))


def _chat(row: ChatRow, coder: _Coder) -> list[_Sequence]:
    """Encode the conversation once with all answers that it shows as generation would, others on their own."""
    render = chat_renderer(row, coder.tokenizer)
    answers = [i for i, message in enumerate(row.messages) if message["role"] == "assistant"]
    whole = render(answers[-1] + 1, False)
    spans: list[tuple[int, int]] = []  # characters [start, end) of the answers in `whole`
    sequences = []
    for i in answers:
        text = render(i + 1, False)
        span = _answer_span(row, i, text, render, coder)
        if whole.startswith(text):
            spans.append(span)
        else:
            sequences.append(_encode_spans(row, text, [span], coder))
    return [*sequences, _encode_spans(row, whole, spans, coder)]


def chat_renderer(row: ChatRow, tokenizer: PreTrainedTokenizerBase) -> Callable[[int, bool], str]:
    """Return `render(count, generation_prompt)`: the first `count` messages in the model's chat template."""
    if not tokenizer.chat_template:
        raise DataError(
            f"{row.where} is a chat, but the model's tokenizer has no chat template: use a model tuned for chat, "
            'set tokenizer.chat_template, or pass {"prompt": ..., "completion": ...} rows'
        )
    if not tokenizer.is_fast:
        raise ConfigurationError(
            f"chats need a tokenizer that knows each token's characters, which {type(tokenizer).__name__} does not: "
            "load the fast one (tokenizer.json)"
        )

    def render(count: int, generation_prompt: bool) -> str:
        try:
            return str(
                tokenizer.apply_chat_template(
                    list(row.messages[:count]), tokenize=False, add_generation_prompt=generation_prompt
                )
            )
        except (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            # A template is a program of the model's author; its error may quote the message, so only its kind is told.
            raise DataError(
                f"the chat template refuses the first {count} messages of {row.where} ({type(error).__name__}): "
                "most templates want an optional system message, then user and assistant in turn"
            ) from None

    return render


def _answer_span(
    row: ChatRow, index: int, text: str, render: Callable[[int, bool], str], coder: _Coder
) -> tuple[int, int]:
    """Return the characters [start, end) of `text`, which ends with answer `index`, that the model would generate."""
    if index == 0:
        raise DataError(
            f"message 1 of {row.where} is an answer to nothing: put a user or system message before it, or leave it out"
        )
    prompt = render(index, True)
    start = next((i for i, (a, b) in enumerate(zip(prompt, text, strict=False)) if a != b), min(len(prompt), len(text)))
    # A template may open the answer with something that history lacks ("<think>"): then it starts where they part.
    if start < len(prompt) and start < len(render(index, False)):
        raise DataError(
            f"cannot tell where the answer in message {index + 1} of {row.where} begins, because the chat template "
            'writes the messages before it differently once it is there: pass {"prompt": ..., "completion": ...} rows'
        )
    # The line end that many templates write after the end-of-turn token is never generated.
    answer = text[start:].rstrip()
    ends_with_token = answer.endswith(tuple(coder.tokenizer.get_added_vocab()))
    return start, start + len(answer) if ends_with_token else len(text)


def _encode_spans(row: ChatRow, text: str, spans: list[tuple[int, int]], coder: _Coder) -> _Sequence:
    # The template writes its own start token, so none is added.
    encoded = coder.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    tokens = list(encoded["input_ids"])
    learned = [any(a < end and b > start for start, end in spans) for a, b in encoded["offset_mapping"]]
    if spans[-1][1] == len(text) and not text.endswith(tuple(coder.tokenizer.get_added_vocab())):
        # A template without an end-of-turn token: the end token is what generation stops at.
        tokens, learned = [*tokens, coder.end], [*learned, True]
    return _Sequence.of(row.where, tokens, learned)
