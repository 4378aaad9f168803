"""Fine-tuning as its caller sees it: budgets, callbacks, early stopping, one's own losses, and the verbs beneath it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from flwr.common import ConfigRecord, MetricRecord
from tests.support.fleet import Fleet

from privatelora.device import DeviceSession, FinetuneReport, StepRecord, local_round
from privatelora.device.data import batches
from privatelora.protocol.errors import ConfigurationError

ROWS = [f"The nickname of colleague {number} is Captain {'abcdef'[number]}." for number in range(6)]
OTHERS = ["Something that was never trained on.", "And another sentence."]
RECIPE: dict[str, Any] = {"epochs": 2, "batch_size": 2, "learning_rate": 1e-2, "warmup_steps": 3, "seed": 5}
STEPS = 6

Values = dict[str, torch.Tensor]


@pytest.fixture
def new(fleet: Fleet) -> Iterator[Callable[..., DeviceSession]]:
    """Sessions with empty stores, closed after the test."""
    opened: list[DeviceSession] = []

    def open_session(**settings: Any) -> DeviceSession:
        opened.append(fleet.session("llama", **({"placement": "first=1,last=1,inline=2+3", "rank": 8} | settings)))
        return opened[-1]

    yield open_session
    for session in opened:
        session.close()


@pytest.fixture(scope="module")
def whole(fleet: Fleet) -> tuple[FinetuneReport, Values]:
    """Report and adapter of the recipe in one go."""
    with fleet.session("llama", placement="first=1,last=1,inline=2+3", rank=8) as me:
        return me.finetune(ROWS, **RECIPE), values_of(me)


def values_of(me: DeviceSession) -> Values:
    return {name: parameter.detach().clone() for name, parameter in me.adapter.named_parameters()}


def same(a: Values, b: Values) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# -- the report -------------------------------------------------------------------------------------------------------


def test_the_report_tells_what_happened(new: Callable[..., DeviceSession]) -> None:
    me = new()
    seen: list[StepRecord] = []
    report = me.finetune(ROWS, callbacks=[seen.append], **RECIPE)
    assert list(report.history) == seen
    assert report.stopped == "finished"
    assert report.steps == STEPS
    assert [record.step for record in seen] == [1, 2, 3, 4, 5, 6]
    assert [record.epoch for record in seen] == [0, 0, 0, 1, 1, 1]
    assert {record.total_steps for record in seen} == {STEPS}
    assert seen[-1].loss < seen[0].loss
    assert report.tokens == sum(record.tokens for record in seen) == 2 * me.examples(ROWS).tokens
    assert (report.bytes_up, report.bytes_down) == (seen[-1].bytes_up, seen[-1].bytes_down)
    assert (report.bytes_up, report.bytes_down) == (me.remote.expected.up, me.remote.expected.down)
    assert all(later.seconds >= sooner.seconds for sooner, later in pairwise(seen))
    assert seen[-1].eta_s == 0
    assert report.tokens_per_s == pytest.approx(report.tokens / report.seconds)


def test_the_rate_warms_up_and_falls_like_a_cosine(whole: tuple[FinetuneReport, Values]) -> None:
    rates = [record.learning_rate for record in whole[0].history]
    cosine = [0.5 * (1 + math.cos(math.pi * step / 3)) for step in range(3)]
    assert rates == pytest.approx([1e-2 * share for share in (1 / 3, 2 / 3, 1, *cosine)])


def test_the_same_seed_gives_the_same_adapter(
    new: Callable[..., DeviceSession], whole: tuple[FinetuneReport, Values]
) -> None:
    me, other = new(), new()
    me.finetune(ROWS, **RECIPE)
    other.finetune(ROWS, **(RECIPE | {"seed": 6}))
    assert same(values_of(me), whole[1])
    assert not same(values_of(other), whole[1])


# -- budgets, and going on --------------------------------------------------------------------------------------------


def test_a_time_budget_stops_and_can_be_resumed(
    new: Callable[..., DeviceSession], whole: tuple[FinetuneReport, Values]
) -> None:
    me = new()
    report = me.finetune(ROWS, max_seconds=1e-6, **RECIPE)
    assert (report.stopped, report.steps) == ("time budget", 1)
    report = me.finetune(ROWS, resume=True, **RECIPE)
    assert [record.step for record in report.history] == [2, 3, 4, 5, 6]
    assert report.stopped == "finished"
    assert same(values_of(me), whole[1])


def test_a_byte_budget_stops_and_can_be_resumed_step_by_step(
    new: Callable[..., DeviceSession], whole: tuple[FinetuneReport, Values]
) -> None:
    me = new()
    first = whole[0].history[0]
    one_step = first.bytes_up + first.bytes_down
    report = me.finetune(ROWS, max_bytes=one_step + 1, **RECIPE)
    assert (report.stopped, report.steps) == ("byte budget", 2)
    assert report.bytes_up + report.bytes_down >= one_step + 1
    stops = []
    while report.stopped != "finished":
        report = me.finetune(ROWS, max_bytes=1, resume=True, **RECIPE)
        stops.append((report.stopped, report.steps))
    assert stops == [("byte budget", 1)] * 3 + [("finished", 1)]  # the last step has nothing after it to stop
    assert same(values_of(me), whole[1])


def test_a_callback_stops_and_another_session_goes_on(
    new: Callable[..., DeviceSession], whole: tuple[FinetuneReport, Values], tmp_path: Any
) -> None:
    me = new(store_dir=tmp_path)
    report = me.finetune(ROWS, callbacks=[lambda record: record.step == 4], **RECIPE)
    assert (report.stopped, report.steps) == ("callback", 4)
    me.close()
    later = new(store_dir=tmp_path)
    report = later.finetune(ROWS, resume=True, **RECIPE)
    assert [record.loss for record in report.history] == [record.loss for record in whole[0].history[4:]]
    assert same(values_of(later), whole[1])


def test_a_callback_that_returns_nothing_stops_nothing(new: Callable[..., DeviceSession]) -> None:
    assert new().finetune(ROWS, callbacks=[lambda record: None], **RECIPE).steps == STEPS


def test_resume_without_a_beginning_begins(
    new: Callable[..., DeviceSession], whole: tuple[FinetuneReport, Values]
) -> None:
    me = new()
    assert me.finetune(ROWS, resume=True, **RECIPE).steps == STEPS
    assert same(values_of(me), whole[1])


@pytest.mark.parametrize("changes", [{"epochs": 3}, {"learning_rate": 2e-2}, {"seed": 6}, {"batch_size": 3}])
def test_another_recipe_is_not_the_one_that_was_cut_off(
    new: Callable[..., DeviceSession], changes: dict[str, Any]
) -> None:
    me = new()
    me.finetune(ROWS, max_bytes=1, **RECIPE)
    with pytest.raises(ConfigurationError, match="repeat them, or run without resume"):
        me.finetune(ROWS, resume=True, **(RECIPE | changes))
    with pytest.raises(ConfigurationError, match="repeat them, or run without resume"):
        me.finetune(ROWS[:5], resume=True, **RECIPE)
    assert me.finetune(ROWS, resume=True, **RECIPE).steps == STEPS - 1  # which is still there


def test_what_is_finished_cannot_be_resumed(new: Callable[..., DeviceSession]) -> None:
    me = new()
    me.finetune(ROWS, **RECIPE)
    with pytest.raises(ConfigurationError, match="nothing to resume"):
        me.finetune(ROWS, resume=True, **RECIPE)


# -- validation -------------------------------------------------------------------------------------------------------


def test_patience_keeps_the_best_adapter(new: Callable[..., DeviceSession], tmp_path: Any) -> None:
    me = new(store_dir=tmp_path)
    recipe = RECIPE | {"epochs": 12, "learning_rate": 5e-2}  # so much that it forgets everything else
    report = me.finetune(ROWS, validation=OTHERS, patience=2, **recipe)
    best = report.validation.index(min(report.validation))
    assert report.stopped == "early stopping"
    assert len(report.validation) == best + 1 + 2 < 12
    assert me.evaluate(OTHERS).loss == report.validation[best]
    me.close()
    later = new(store_dir=tmp_path)
    assert later.evaluate(OTHERS).loss == report.validation[best]  # it is the one that was saved
    with pytest.raises(ConfigurationError, match="nothing to resume"):
        later.finetune(ROWS, validation=OTHERS, patience=2, resume=True, **recipe)


def test_validation_without_patience_only_looks(
    new: Callable[..., DeviceSession], whole: tuple[FinetuneReport, Values]
) -> None:
    me = new()
    report = me.finetune(ROWS, validation=OTHERS, **RECIPE)
    assert len(report.validation) == 2
    assert report.validation[-1] == me.evaluate(OTHERS).loss
    assert same(values_of(me), whole[1])


def test_evaluation_is_a_mean_over_labelled_tokens_whatever_the_batches(new: Callable[..., DeviceSession]) -> None:
    me = new()
    found = me.evaluate(ROWS)
    assert found.examples == 6
    assert found.tokens == me.examples(ROWS).labelled_tokens
    one_by_one = [me.evaluate([row]) for row in ROWS]
    mean = sum(each.loss * each.tokens for each in one_by_one) / found.tokens
    assert found.loss == pytest.approx(mean, rel=1e-6)
    assert me.evaluate(ROWS, batch_size=2).loss == pytest.approx(mean, rel=1e-6)


def test_long_rows_are_evaluated_in_batches_that_the_service_takes(new: Callable[..., DeviceSession]) -> None:
    me = new()
    rows = ["x" * 500 for _ in range(20)]  # 10,000 tokens, where a step has 8,192
    assert me.service.info.limits.max_tokens_per_step == 8192
    found = me.evaluate(rows, batch_size=20)
    assert found.examples == 20
    assert found.loss == pytest.approx(me.evaluate(rows[:1]).loss, rel=1e-6)


# -- losses and verbs -------------------------------------------------------------------------------------------------


def test_a_loss_of_ones_own_is_what_is_trained(new: Callable[..., DeviceSession]) -> None:
    me = new()
    batch = me.examples(ROWS).examples[:3]
    shapes = []

    def twice(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        shapes.append((logits.shape, logits.dtype, labels.shape))
        return 2 * F.cross_entropy(logits, labels)

    once = me.forward_backward(batch)
    gradients = [parameter.grad for parameter in me.adapter.parameters()]
    me.optimizer.zero_grad()
    double = me.forward_backward(batch, twice)
    assert shapes == [((once.labelled_tokens, me.config.vocab_size), torch.float32, (once.labelled_tokens,))]
    assert double.loss == 2 * once.loss
    for parameter, gradient in zip(me.adapter.parameters(), gradients, strict=True):
        assert parameter.grad is not None
        assert gradient is not None
        assert torch.equal(parameter.grad, 2 * gradient)  # by a power of two, so exactly


def test_finetune_uses_a_loss_of_ones_own(
    new: Callable[..., DeviceSession], whole: tuple[FinetuneReport, Values]
) -> None:
    me = new()

    def smoothed(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits, labels, label_smoothing=0.2)

    report = me.finetune(ROWS, loss_fn=smoothed, **RECIPE)
    assert report.history[0].loss != whole[0].history[0].loss
    assert not same(values_of(me), whole[1])


def test_the_verbs_by_hand_equal_finetune(
    new: Callable[..., DeviceSession], whole: tuple[FinetuneReport, Values]
) -> None:
    report, values = whole
    me = new()
    examples = me.examples(ROWS).examples
    rates = iter(record.learning_rate for record in report.history)
    losses = []
    for epoch in range(RECIPE["epochs"]):
        for rows in batches(examples, RECIPE["batch_size"], RECIPE["seed"], epoch):
            losses.append(me.forward_backward([examples[row] for row in rows]).loss)
            me.optim_step(next(rates))
    assert losses == [record.loss for record in report.history]
    assert same(values_of(me), values)


def test_gradients_of_several_batches_add_up(new: Callable[..., DeviceSession]) -> None:
    me = new()
    first, second = me.examples(ROWS).examples[:2], me.examples(ROWS).examples[2:4]
    single = []
    for batch in (first, second):
        me.forward_backward(batch)
        single.append([parameter.grad for parameter in me.adapter.parameters()])
        me.optimizer.zero_grad()
    me.forward_backward(first)
    me.forward_backward(second)
    for parameter, a, b in zip(me.adapter.parameters(), *single, strict=True):
        assert a is not None
        assert b is not None
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, a + b)


def test_optim_step_clips_to_the_norm_and_clears_the_gradient(new: Callable[..., DeviceSession]) -> None:
    me = new()
    batch = me.examples(ROWS).examples[:2]
    me.forward_backward(batch)
    norm = torch.cat([p.grad.flatten() for p in me.adapter.parameters() if p.grad is not None]).norm()
    assert me.optim_step(0.0, clip_norm=1e-3) == pytest.approx(float(norm), rel=1e-5)
    assert all(parameter.grad is None for parameter in me.adapter.parameters())
    moment = next(iter(me.optimizer.state.values()))["exp_avg"]
    assert 0 < float(moment.norm()) <= 1e-4 * (1 + 1e-5)  # a tenth of the clipped gradient


async def test_the_async_twin_equals_finetune(
    new: Callable[..., DeviceSession], whole: tuple[FinetuneReport, Values]
) -> None:
    me = new()
    report = await me.afinetune(ROWS, **RECIPE)
    assert [record.loss for record in report.history] == [record.loss for record in whole[0].history]
    assert same(values_of(me), whole[1])


# -- rounds -----------------------------------------------------------------------------------------------------------


def test_a_round_changes_its_state_and_answers_in_numbers_only(
    new: Callable[..., DeviceSession], whole: tuple[FinetuneReport, Values]
) -> None:
    me = new()
    fresh = me.state()
    before = {name: array.numpy().copy() for name, array in fresh.array_records["adapter"].items()}
    for state in (me.state(), fresh):  # a round knows what its state says, not what the session did before
        metrics = local_round(ConfigRecord(RECIPE), state, session=me, data=ROWS)
        assert isinstance(metrics, MetricRecord)
        assert metrics["steps"] == STEPS
        assert metrics["loss"] == whole[0].history[-1].loss
        for name, array in state.array_records["adapter"].items():
            assert array.numpy().tobytes() == whole[1][name].numpy().tobytes()
            assert array.numpy().tobytes() != before[name].tobytes()
        assert set(state.array_records) == {"adapter", "exp_avg", "exp_avg_sq"}


def test_a_round_refuses_a_setting_that_it_does_not_have(new: Callable[..., DeviceSession]) -> None:
    me = new()
    with pytest.raises(ConfigurationError, match="epoch; known: epochs"):
        local_round(ConfigRecord({"epoch": 3}), me.state(), session=me, data=ROWS)


def test_later_epochs_cost_nothing_where_nothing_below_the_last_layers_is_trained(
    new: Callable[..., DeviceSession],
) -> None:
    report = new(placement="last=2").finetune(ROWS, **(RECIPE | {"epochs": 3}))
    first, later = report.history[:3], report.history[3:]
    assert all(later.bytes_up > sooner.bytes_up for sooner, later in pairwise(first))
    assert {(record.bytes_up, record.bytes_down) for record in later} == {(first[-1].bytes_up, first[-1].bytes_down)}
    assert report.history[-1].loss < report.history[0].loss
