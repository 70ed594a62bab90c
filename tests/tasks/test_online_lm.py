"""Online adaptation of language models: its losses on hand-made cases, its data, its stages, and the whole command."""

from __future__ import annotations

import gzip
import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bilevel
from bilevel import cli, trees
from bilevel.errors import DataError
from bilevel.models.conversion import as_tree
from bilevel.tasks.online_lm import (
    baselines,
    evaluation,
    formats,
    grammar,
    losses,
    models,
    precision,
    scores,
    stages,
    tokens,
)
from bilevel.tasks.online_lm.adaptation import adapted, learned
from bilevel.tasks.online_lm.config import OnlineLM
from bilevel.tasks.online_lm.documents import Corpus, Document, Question, questions_of
from bilevel.tasks.online_lm.problem import problem, setup
from bilevel.tasks.online_lm.weight_model import WeightModel, WeightModelConfig
from bilevel.tasks.online_lm.windows import window

SMALL = OnlineLM(
    width=8,
    layers=1,
    heads=2,
    vocabulary=1500,
    context=64,
    tune_steps=4,
    tune_batch=4,
    tune_documents=2,
    inner_steps=3,
    short_draws=1,
    short_steps=2,
    outer_questions=4,
    locality_batch=2,
    stream=4,
    evaluation_runs=2,
    learning_rates=(0.05, 0.1),
    answer_tokens=3,
)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return grammar.corpus(0, meta=6, validation=3, test=3)


@pytest.fixture(scope="module")
def tokenizer(corpus: Corpus) -> Any:
    return tokens.train_tokenizer([d.text for d in corpus.tune], 1500)


def language_model(tokenizer: Any, config: OnlineLM = SMALL) -> Any:
    """In float64, with weights large enough that the derivatives are not lost in rounding."""
    torch.manual_seed(0)
    model = models.from_scratch(config, tokenizer).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def weight_model_for(model: Any) -> Any:
    """Its last layer is not zero, so that the weights differ and the whole body counts."""
    torch.manual_seed(1)
    made = WeightModel.on_top_of(model, hidden=4).double()
    with torch.no_grad():
        made.weight.weight.normal_()
    return made


# -- losses by hand ----------------------------------------------------------------------------------------------------

# Log-probabilities over three tokens at four positions; position i predicts token i + 1.
P = torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.2, 0.7], [0.6, 0.3, 0.1], [0.2, 0.2, 0.6]]], dtype=torch.float64)


def test_weights_belong_to_the_token_that_is_predicted() -> None:
    weights = torch.tensor([[100.0, 2.0, 0.0, 3.0]], dtype=torch.float64)  # nothing predicts the first token
    found = losses.weighted_nll(P.log(), torch.tensor([[2, 1, 0, 1]]), weights)
    assert float(found) == pytest.approx(-(2 * math.log(0.25) + 0 * math.log(0.1) + 3 * math.log(0.3)) / 3, rel=1e-12)


def test_weights_of_one_are_the_language_models_own_loss(tokenizer: Any) -> None:
    model = language_model(tokenizer)
    ids = torch.tensor([[5, 17, 300, 8]])
    with torch.no_grad():
        output = model(input_ids=ids, labels=ids)
    assert float(losses.weighted_nll(output.logits, ids, torch.ones(1, 4))) == pytest.approx(float(output.loss))


@pytest.mark.parametrize("padding", [0, 1, 20])
def test_the_answers_loss_is_the_mean_over_answer_tokens_alone(padding: int) -> None:
    """However many prompt tokens and padding there are: the released code divides by all positions."""
    logits = torch.cat([P.log(), torch.randn(1, padding, 3, dtype=torch.float64)], 1)
    labels = torch.tensor([[-100, -100, 0, 2] + [-100] * padding])
    expected = -(math.log(0.1) + math.log(0.1)) / 2
    assert float(losses.answer_nll(logits, labels)) == pytest.approx(expected, rel=1e-12)


def test_no_word_of_the_vocabulary_is_ignored() -> None:
    for word in range(3):
        labels = torch.tensor([[-100, word, -100, -100]])
        expected = -math.log(float(P[0, 0, word]))
        assert float(losses.answer_nll(P.log(), labels)) == pytest.approx(expected, rel=1e-12)


def test_divergence_by_hand_and_only_where_there_is_text() -> None:
    before = torch.tensor([[[0.2, 0.3, 0.5], [0.4, 0.4, 0.2], [1 / 3, 1 / 3, 1 / 3], [0.9, 0.05, 0.05]]]).double()
    expected = sum(
        float(p * math.log(p / q)) for i in (0, 1) for p, q in zip(before[0, i].tolist(), P[0, i].tolist(), strict=True)
    )
    found = losses.kl_from_initial(P.log(), before.log(), torch.tensor([[1, 1, 0, 0]]))
    assert float(found) == pytest.approx(expected / 2, rel=1e-12)
    assert float(losses.kl_from_initial(P.log() + 7, P.log(), torch.ones(1, 4))) == pytest.approx(0, abs=1e-12)


def test_the_divergence_is_from_the_initial_model(corpus: Corpus, tokenizer: Any) -> None:
    """At the base model itself it is zero with a gradient of zero, after a document it is not."""
    model = language_model(tokenizer)
    made = setup(SMALL, corpus, model, tokenizer, weight_model_for(model), seed=0)
    batch, ids = made.outer_batch_of(1), made.inner_batches_of(1)[0]
    values = {}
    for weight in (0.0, 10.0):
        task = problem(OnlineLM(kl_weight=weight, inner_lr=0.5), model)
        state = task.init(None)
        after = task.step(state, as_tree(weight_model_for(model)), ids)
        values[weight] = [float(task.outer_loss(each, None, batch).detach()) for each in (state, after)]
    assert values[10.0][0] == pytest.approx(values[0.0][0], rel=1e-12)
    assert values[10.0][1] > values[0.0][1] + 1e-4


# -- one objective for every estimator ---------------------------------------------------------------------------------


def hypergradients(corpus: Corpus, tokenizer: Any, config: OnlineLM, model: Any) -> tuple[Any, Any, Any]:
    made = setup(config, corpus, model, tokenizer, weight_model_for(model), seed=0)
    inner, outer = made.inner_batches_of(1), made.outer_batch_of(1)
    return made, inner, outer


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_exact_reverse_and_forward_gradients_have_one_objective(corpus: Corpus, architecture: Any) -> None:
    """The same value, and directional derivatives w = ∇h · v equal to 1e-6 along eight random directions."""
    config = OnlineLM(**{**vars(SMALL), "architecture": architecture})
    tokenizer = tokens.train_tokenizer([d.text for d in corpus.tune], 1500)
    model = language_model(tokenizer, config)
    made, inner, outer = hypergradients(corpus, tokenizer, config, model)
    exact = bilevel.Reverse("sqrt")(made.problem, made.meta, inner, outer)
    graph = bilevel.Reverse("graph")(made.problem, made.meta, inner, outer)
    for left, right in zip(trees.leaves(exact.grad), trees.leaves(graph.grad), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-12)
    count = trees.size(exact.grad)
    norm = float(trees.squared_norm(trees.leaves(exact.grad)).sqrt())
    assert norm > 1e-6
    for draw in range(8):
        estimate = bilevel.ForwardGradient(1, draw=draw)(made.problem, made.meta, inner, outer)
        # with one Rademacher direction v the estimate is w v: w² N is its squared norm, and ∇h · (w v) = w²
        squared = float(trees.squared_norm(trees.leaves(estimate.grad))) / count
        along = float(trees.dot(trees.leaves(exact.grad), trees.leaves(estimate.grad)))
        assert along == pytest.approx(squared, rel=1e-6, abs=1e-6 * norm * abs(squared) ** 0.5)
        assert estimate.value.item() == pytest.approx(exact.value.item(), rel=1e-12)


def test_against_finite_differences_of_plain_training(corpus: Corpus, tokenizer: Any) -> None:
    """The evaluation's own loop with `torch.optim.SGD` is the inner loop that is differentiated."""
    model = language_model(tokenizer)
    weight_model = weight_model_for(model)
    made = setup(SMALL, corpus, model, tokenizer, weight_model, seed=0)
    outer = made.outer_batch_of(1)
    documents = [corpus.meta[i] for i in window(0, 3, len(corpus.meta), 0)]
    encoded = [tokens.document(tokenizer, d.text, SMALL.context) for d in documents]

    def after() -> float:
        learner = adapted(model, encoded, learned(weight_model), SMALL.inner_lr)
        with torch.no_grad():
            asked = learner(input_ids=outer.questions.ids, attention_mask=outer.questions.mask).logits
            other = learner(input_ids=outer.locality.ids, attention_mask=outer.locality.mask).logits
            divergence = losses.kl_from_initial(other, outer.initial_log_probs, outer.locality.mask)
            return float(losses.answer_nll(asked, outer.questions.labels) + SMALL.kl_weight * divergence)

    estimate = bilevel.Reverse()(made.problem, made.meta, made.inner_batches_of(1), outer)
    assert estimate.value.item() == pytest.approx(after(), rel=1e-10)
    entry, step = weight_model.weight.bias, 1e-4
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            entry += sign * step
        values.append(after())
        with torch.no_grad():
            entry -= sign * step
    assert float(estimate.grad["weight.bias"]) == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-6)


def test_an_operation_without_forward_mode_has_exact_tangents_and_differences(corpus: Corpus, tokenizer: Any) -> None:

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            """There is nothing to keep."""

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:  # noqa: ARG004
            return grads[0].clone()

    model = language_model(tokenizer)
    inside = model.transformer.ln_f.forward
    model.transformer.ln_f.forward = lambda x: Once.apply(inside(x))
    made, inner, outer = hypergradients(corpus, tokenizer, SMALL, model)
    exact = bilevel.ForwardGradient(1, chunk_size=1)(made.problem, made.meta, inner, outer)
    assert exact.diagnostics["hessian_product_steps"] > 0
    estimate = bilevel.ForwardGradient(1, tangents="difference")(made.problem, made.meta, inner, outer)
    plain = language_model(tokenizer)
    made, inner, outer = hypergradients(corpus, tokenizer, SMALL, plain)
    expected = bilevel.ForwardGradient(1)(made.problem, made.meta, inner, outer)
    for found, tolerance in ((exact, 1e-5), (estimate, 1e-3)):
        error = [a - b for a, b in zip(trees.leaves(found.grad), trees.leaves(expected.grad), strict=True)]
        relative = float((trees.squared_norm(error) / trees.squared_norm(trees.leaves(expected.grad))).sqrt())
        assert relative < tolerance


# -- windows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "available"), [(3, 12), (5, 12), (12, 12), (1, 4)])
def test_windows_share_no_document_within_a_pass(steps: int, available: int) -> None:
    per_pass = available // steps
    for start in (0, per_pass):
        seen = [i for draw in range(start, start + per_pass) for i in window(draw, steps, available, seed=3)]
        assert len(seen) == per_pass * steps == len(set(seen))
        assert set(seen) <= set(range(available))
    assert window(0, steps, available, 3) != window(per_pass, steps, available, 3) or available < 5


def test_questions_are_about_the_documents_of_their_window(corpus: Corpus, tokenizer: Any) -> None:
    model = language_model(tokenizer)
    made = setup(SMALL, corpus, model, tokenizer, weight_model_for(model), seed=0)
    for draw, length in ((0, SMALL.short_steps), (1, SMALL.inner_steps), (2, SMALL.inner_steps)):
        inner, outer = made.inner_batches_of(draw), made.outer_batch_of(draw)
        assert len(inner) == length == len(outer.questions.ids)
        learnt = [tokenizer.decode(inner[t][0]) for t in range(length)]
        for row in outer.questions.labels:
            answer = tokenizer.decode(row[row != tokens.IGNORED], skip_special_tokens=True).strip()
            assert any(f"is {answer}." in text for text in learnt)


# -- streams -----------------------------------------------------------------------------------------------------------


def evaluation_of(corpus: Corpus, stream: int) -> evaluation.Evaluation:
    return evaluation.Evaluation(OnlineLM(**{**vars(SMALL), "stream": stream}), corpus, None, None, seed=5)


@pytest.mark.parametrize(("stream", "streams"), [(8, 6), (12, 4), (10, 6), (1, 12), (48, 1), (1000, 1)])
def test_streams_hold_whole_stories_and_share_none(corpus: Corpus, stream: int, streams: int) -> None:
    """Of 12 stories told four times each, as many as fit; one is never cut, also where it is longer than the stream."""
    made = [evaluation_of(corpus, stream).stream(corpus.test, number) for number in range(streams)]
    assert {len(each) for each in made} == {min(max(stream // 4, 1) * 4, 48)}
    told = [document.text for each in made for document in each]
    assert len(told) == len(set(told)) == 48
    if len(made[0]) > 4:
        assert [d.story for d in made[0]] != sorted((d.story for d in made[0]), key=[d.story for d in made[0]].index)
    after = evaluation_of(corpus, stream).stream(corpus.test, streams)  # a new pass, in another order
    assert after != made[0] or len(after) == 4
    assert len(after) == len(made[0])


def test_documents_without_a_story_are_cut_one_by_one(corpus: Corpus) -> None:
    plain = [Document(str(i), ()) for i in range(7)]
    made = [evaluation_of(corpus, 3).stream(plain, number) for number in range(2)]
    assert [len(each) for each in made] == [3, 3]
    assert len({d.text for each in made for d in each}) == 6


def test_a_question_about_several_documents_is_asked_once(corpus: Corpus) -> None:
    assert len(questions_of(corpus.test)) == 12 == len(corpus.test) // grammar.TELLINGS


# -- tokens ------------------------------------------------------------------------------------------------------------


def test_a_tokenizer_without_padding_gives_the_same_losses_padded_or_not(tokenizer: Any) -> None:
    assert tokenizer.pad_token_id is None
    model = language_model(tokenizer)
    asked = [Question("Who?", ("red",)), Question("What is the trade of this and that old miller?", ("a goat",))]
    batch = tokens.questions(tokenizer, asked, 32)
    assert (batch.labels == tokens.IGNORED).any()
    together = losses.token_nll(model(input_ids=batch.ids, attention_mask=batch.mask).logits, batch.labels).sum()
    alone = []
    for question in asked:
        ids, labels = tokens.question_and_answer(tokenizer, question, 32)
        alone.append(losses.token_nll(model(input_ids=torch.tensor([ids])).logits, torch.tensor([labels])).sum())
    torch.testing.assert_close(together, sum(alone), rtol=1e-10, atol=0)  # pyright: ignore


def test_an_answer_ends_and_survives_a_long_question(tokenizer: Any) -> None:
    ids, labels = tokens.question_and_answer(tokenizer, Question("word " * 200, ("red",)), 20)
    assert len(ids) == 20 == len(labels)
    answered = [label for label in labels if label != tokens.IGNORED]
    assert tokenizer.decode(answered[:-1]).strip() == "red"
    assert answered[-1] == tokenizer.eos_token_id


def test_a_tokenizer_without_an_end_is_refused(tokenizer: Any) -> None:
    from transformers import PreTrainedTokenizerFast

    endless = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        tokens.end_of(endless)


def test_a_long_document_is_cut_with_a_warning(corpus: Corpus, tokenizer: Any) -> None:
    cut = tokens.document(tokenizer, "The old miller. " * 100, 16)
    assert cut.ids.shape == (1, 16)
    assert cut.truncated
    assert len(cut.spans) == 16
    long = Corpus([Document("The gate. " * 100, corpus.tune[0].questions)], [], [], [], [])
    with pytest.warns(UserWarning, match="1 of 1 documents are longer than context=64"):
        stages.report_truncation(SMALL, long, tokenizer)


def test_a_context_beyond_the_models_is_refused(tokenizer: Any) -> None:
    model = language_model(tokenizer)
    with pytest.raises(ValueError, match=r"need 103 positions, but scratch has 67; take context=64 or less"):
        stages.require_room(OnlineLM(**{**vars(SMALL), "context": 100}), model, "scratch")


# -- data --------------------------------------------------------------------------------------------------------------


def test_the_grammars_parts_share_no_person(corpus: Corpus) -> None:
    parts = [corpus.meta, corpus.validation, corpus.test]
    people = [{d.questions[0].text.split(" of ")[1] for d in part} for part in parts]
    assert [len(names) for names in people] == [6, 3, 3]
    assert len(set().union(*people)) == 12
    for part in (corpus.tune, *parts):
        for document in part:
            (question,) = document.questions
            kind, name = question.text.removeprefix("What is the ").removesuffix("?").split(" of ")
            assert f"The {kind} of {name} is {question.answers[0]}." in document.text
    assert grammar.corpus(0, 6, 3, 3) == corpus
    assert grammar.corpus(1, 6, 3, 3) != corpus


def test_the_base_model_is_told_of_everybody_what_is_no_longer_true(corpus: Corpus) -> None:
    before = {d.questions[0].text: d.questions[0].answers for d in corpus.tune}
    assert len(before) == len(corpus.tune) == 12 * 4
    news = [*corpus.meta, *corpus.validation, *corpus.test]
    assert len({d.text for d in news}) == len(news) == 12 * 4 * grammar.TELLINGS
    now = {}
    for document in news:
        (question,) = document.questions
        assert question.answers != before[question.text]
        assert now.setdefault(question.text, question.answers) == question.answers  # every telling says the same
        assert document.story == question.text
    assert now.keys() == before.keys()


def squad_file(path: Path, paragraphs: list[Any], wrapped: bool = True) -> None:
    content = {"paragraphs": paragraphs}
    text = json.dumps({"data": [content], "version": "1.1"} if wrapped else content).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)


def paragraph(number: int, answers: list[str] | None = None) -> dict[str, Any]:
    given = [f"answer {number}"] if answers is None else answers
    return {
        "context": f"Paragraph {number} holds answer {number}.",
        "qas": [{"question": f"Which {number}?", "answers": [{"text": a, "answer_start": 0} for a in given]}],
    }


@pytest.mark.parametrize("wrapped", [True, False])
def test_squad_files(tmp_path: Path, wrapped: bool) -> None:
    squad_file(tmp_path / "train-v1.1.json.gz", [paragraph(i) for i in range(100)], wrapped)
    squad_file(tmp_path / "dev-v1.1.json", [paragraph(200, ["a", "b"])])
    found = formats.squad(tmp_path)
    assert [len(part) for part in (found.tune, found.meta, found.validation, found.test)] == [49, 44, 7, 1]
    texts = [d.text for part in (found.tune, found.meta, found.validation) for d in part]
    assert len(set(texts)) == 100
    assert found.test[0].questions == (Question("Which 200?", ("a", "b")),)
    assert set(found.locality) == {d.text for d in found.tune}


def test_what_cannot_be_used_is_left_out_and_counted(tmp_path: Path) -> None:
    empty = {"context": "  ", "qas": paragraph(0)["qas"]}
    unasked = {"context": "Nobody asks.", "qas": []}
    train = [*(paragraph(i) for i in range(20)), empty, unasked, paragraph(98, []), paragraph(99, [""])]
    squad_file(tmp_path / "train.json", train)
    squad_file(tmp_path / "dev.json", [paragraph(1)])
    expected = "1 empty documents, 2 questions without an answer, 3 documents without a question"
    with pytest.warns(UserWarning, match=expected):
        found = formats.squad(tmp_path)
    assert sum(len(part) for part in (found.tune, found.meta, found.validation)) == 20


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"dev.json": "{}"}, "no file for train"),
        ({"train.json": "{}", "dev.json": "{}"}, "not in SQuAD's format"),
        ({"train.json": "[]", "dev.json": "{}"}, "not in SQuAD's format"),
        ({"train.json": "{", "dev.json": "{}"}, "not in SQuAD's format"),
        ({"train.json.gz": "not packed", "dev.json": "{}"}, "is damaged"),
        ({"train.json": "{}", "train2.json": "{}", "dev.json": "{}"}, "several files for train"),
    ],
)
def test_bad_squad_files(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        formats.squad(tmp_path)


def test_streamingqa_joins_questions_to_documents(tmp_path: Path) -> None:
    documents = [{"sorting_key": f"key-{i}", "publication_ts": 0, "text": f"Text {i}."} for i in range(30)]
    (tmp_path / "wmt_docs.jsonl").write_text("\n".join(map(json.dumps, documents)))

    def rows(numbers: range) -> str:
        return "\n".join(
            json.dumps({"qa_id": str(i), "question": f"Q{i}?", "answers": [f"A{i}", "B"], "evidence_id": f"key-{i}"})
            for i in numbers
        )

    (tmp_path / "streaminqa_train.jsonl.gz").write_bytes(gzip.compress(rows(range(20)).encode()))
    (tmp_path / "streaminqa_valid.jsonl").write_text(rows(range(20, 25)))
    (tmp_path / "streaminqa_eval.jsonl").write_text(rows(range(25, 32)))
    with pytest.warns(UserWarning, match="left out 2 questions whose document"):
        found = formats.table(tmp_path)
    assert [len(part) for part in (found.tune, found.meta, found.validation, found.test)] == [10, 10, 5, 5]
    assert found.test[0] == Document("Text 25.", (Question("Q25?", ("A25", "B")),))


def test_archivalqa_groups_the_questions_of_a_paragraph(tmp_path: Path) -> None:
    (tmp_path / "paragraphs.csv").write_text("para_id,text\n1,One.\n2,Two.\n3,Three.\n")
    (tmp_path / "archivalqa_train.csv").write_text("id,question,answer,para_id\na,Q1?,x,1\nb,Q2?,y,2\nc,Q3?,z,1\n")
    (tmp_path / "archivalqa_val.csv").write_text("id,question,answer,para_id\nd,Q4?,v,3\n")
    (tmp_path / "archivalqa_test.csv").write_text("id,question,answer,para_id\ne,Q5?,w,3\n")
    found = formats.table(tmp_path)
    assert [*found.tune, *found.meta] == [
        Document("One.", (Question("Q1?", ("x",)), Question("Q3?", ("z",)))),
        Document("Two.", (Question("Q2?", ("y",)),)),
    ]
    (tmp_path / "paragraphs.csv").unlink()
    with pytest.raises(DataError, match="no question has a document"):
        formats.table(tmp_path)


# -- scores and controls -----------------------------------------------------------------------------------------------


def test_scores_as_squad_defines_them() -> None:
    assert scores.exact_match("The Beyoncé!", ["beyoncé"]) == 1
    assert scores.exact_match("thermal", ["the rmal"]) == 0
    assert scores.f1("in the year 1066", ["1066"]) == pytest.approx(2 * 1 / (3 + 1))
    assert scores.f1("red red", ["red"]) == pytest.approx(2 / 3)  # a word counts as often as it occurs in both
    assert scores.f1("red red", ["red red green"]) == pytest.approx(2 * 2 / 5)
    assert scores.f1("", [""]) == 1
    assert scores.f1("the", ["a"]) == 1  # nothing is left of either


def test_tf_idf_by_hand() -> None:
    def encoded(*ids: int) -> tokens.EncodedDocument:
        return tokens.EncodedDocument(torch.tensor([ids]), "", ())

    weigh = baselines.tf_idf([encoded(0, 1), encoded(0, 2), encoded(0, 2)], 4)
    idf = [math.log(4 / (1 + df)) + 1 for df in (3, 1, 2)]
    raw = torch.tensor([2 * idf[0], 2 * idf[0], idf[1], idf[2]])
    torch.testing.assert_close(weigh(encoded(0, 0, 1, 2))[0], raw / raw.mean())


def test_salient_spans_mark_names_and_numbers(tokenizer: Any) -> None:
    text = "The trade of Mavole is potter. Then he saw Arlen in 1066."
    document = tokens.document(tokenizer, text, 64)
    weights = baselines.salient_spans(baselines.capitalised_or_number)(document)[0]
    marked = {text[s:e].strip() for (s, e), w in zip(document.spans, weights, strict=True) if w > 0}
    assert marked
    assert all(part in "Mavole Arlen 1066" for part in marked)
    assert float(weights.mean()) == pytest.approx(1)
    plain = tokens.document(tokenizer, "nothing here", 64)
    assert torch.equal(baselines.salient_spans(baselines.capitalised_or_number)(plain), torch.ones(plain.ids.shape))


# -- the weight model --------------------------------------------------------------------------------------------------


def test_the_weight_model_starts_uniform_and_looks_back_only(tokenizer: Any) -> None:
    model = language_model(tokenizer)
    fresh = WeightModel.on_top_of(model)
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    torch.testing.assert_close(fresh(ids), torch.full((1, 5), math.log(2) / 3))
    for name, tensor in model.base_model.state_dict().items():
        assert torch.equal(fresh.body.state_dict()[name].double(), tensor.float().double())
    trained = weight_model_for(model)
    changed = ids.clone()
    changed[0, 3] = 9
    assert torch.equal(trained(ids)[0, :3], trained(changed)[0, :3])
    assert not torch.equal(trained(ids)[0, 3:], trained(changed)[0, 3:])
    assert (trained(ids) > 0).all()


def test_the_weight_model_is_saved_the_hugging_face_way(tokenizer: Any, tmp_path: Path) -> None:
    made = weight_model_for(language_model(tokenizer)).float()
    made.save_pretrained(tmp_path)
    again = WeightModel.from_pretrained(tmp_path)
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    torch.testing.assert_close(again(ids), made(ids), rtol=0, atol=0)


def test_a_body_of_no_known_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="model type 'nonsense'"):
        WeightModel(WeightModelConfig(body={"model_type": "nonsense"}))


# -- LoRA and precision ------------------------------------------------------------------------------------------------


def test_lora_leaves_the_weights_themselves_alone(corpus: Corpus, tokenizer: Any) -> None:
    model = language_model(tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's remark that GPT-2 stores its matrices transposed
        learner = models.with_lora(model, 2).double()
    made = setup(SMALL, corpus, learner, tokenizer, weight_model_for(language_model(tokenizer)), seed=0)
    exact = bilevel.Reverse()(made.problem, made.meta, made.inner_batches_of(1), made.outer_batch_of(1))
    names = exact.state.params.named_tensors
    assert names
    assert all("lora_" in name for name in names)
    assert sum(t.numel() for t in names.values()) < sum(p.numel() for p in model.parameters()) / 4
    assert any(bool(g.any()) for g in trees.leaves(exact.grad))


def test_bf16_is_checked_against_float32(corpus: Corpus, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = OnlineLM(**{**vars(SMALL), "precision": "bfloat16"})
    model = language_model(tokenizer).float()
    made = setup(config, corpus, model, tokenizer, weight_model_for(model).float(), seed=0)
    error = precision.difference(config, model, made, seed=0)
    assert 1e-6 < error < 0.5  # it is computed in another precision, and is the same thing
    estimate = bilevel.Reverse()(made.problem, made.meta, made.inner_batches_of(1), made.outer_batch_of(1))
    assert all(t.dtype == torch.float32 for t in trees.leaves(estimate.state.params))
    monkeypatch.setattr(precision, "TOLERANCE", error / 2)
    with pytest.warns(UserWarning, match="off those in float32"):
        precision.warn_if_off(config, model, made, seed=0)
    monkeypatch.setattr(precision, "TOLERANCE", error * 2)
    precision.warn_if_off(config, model, made, seed=0)


# -- loading -----------------------------------------------------------------------------------------------------------


def test_a_model_that_cannot_be_had_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"no local folder, and could not be had.*pass its path"):
        models.load("no-such-owner/no-such-model")
    with pytest.raises(DataError, match="no folder that transformers can load"):
        models.load(str(tmp_path))


# -- stages and the whole command --------------------------------------------------------------------------------------

FLAGS = [
    *("--width", "8", "--layers", "1", "--heads", "2", "--tune-steps", "4", "--tune-batch", "4"),
    *("--tune-documents", "2", "--inner-steps", "3", "--short-draws", "1", "--short-steps", "2", "--stream", "4"),
    *("--evaluation-runs", "2", "--learning-rates", "0.05", "0.1", "--answer-tokens", "3", "--outer-steps", "2"),
    *("--clip-norm", "1e-6"),
]


@pytest.fixture
def small_language(monkeypatch: pytest.MonkeyPatch, corpus: Corpus) -> None:
    monkeypatch.setattr(grammar, "corpus", lambda seed: corpus)


def test_an_interrupted_tuning_goes_on_to_the_same_model(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = stages.tuned_model(SMALL, corpus, 0, None, progress=False)
    monkeypatch.setattr(stages, "_EVERY", 2)
    original, calls = stages._tuning_loss, []

    def interrupted(*arguments: Any) -> Tensor:
        calls.append(arguments[-1])
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(stages, "_tuning_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stages.tuned_model(SMALL, corpus, 0, tmp_path, progress=False)
    resumed, _ = stages.tuned_model(SMALL, corpus, 0, tmp_path, progress=False)
    assert calls == [0, 1, 2, 3, 2, 3]
    for left, right in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(left, right)
    assert sorted(p.name for p in (tmp_path / "stages").iterdir()) == ["base"]
    stored, _ = stages.tuned_model(SMALL, corpus, 0, tmp_path, progress=False)
    assert len(calls) == 6
    for left, right in zip(whole.parameters(), stored.parameters(), strict=True):
        assert torch.equal(left, right)


@pytest.mark.usefixtures("small_language")
def test_the_command_from_nothing_to_a_report(tmp_path: Path) -> None:
    out = tmp_path / "run"
    cli.main(["run", "online-lm", *FLAGS, "--out", str(out)])
    results = json.loads((out / "results.json").read_text())
    assert results["task"] == "online-lm"
    assert list(results["methods"]) == ["meta_learned", "uniform", "tf_idf", "salient_spans", "no_adaptation"]
    for found in results["methods"].values():
        for measure in evaluation.MEASURES:
            assert len(found[measure]["runs"]) == 2
            assert math.isfinite(found[measure]["mean"])
    assert results["methods"]["no_adaptation"]["learning_rate"] is None
    assert (out / "report.html").stat().st_size > 10_000
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    for row in rows:
        assert row["clipped_to"] == pytest.approx(min(1.0, 1e-6 / row["grad_norm"]))
    before = results["methods"]
    trained = WeightModel.from_pretrained(out / "weight_model")
    assert not torch.equal(trained.weight.weight, torch.zeros_like(trained.weight.weight))
    (out / "results.json").unlink()
    cli.main(["run", "online-lm", *FLAGS, "--out", str(out), "--resume"])
    assert json.loads((out / "results.json").read_text())["methods"] == before


@pytest.mark.usefixtures("small_language")
def test_a_refused_run_leaves_nothing_unless_a_stage_is_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main(["run", "online-lm", "--data", "squad", "--out", str(tmp_path / "run")])
    assert "pass --data-dir" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    with pytest.raises(SystemExit):  # tuned, but there are 96 documents
        cli.main(["run", "online-lm", *FLAGS, "--inner-steps", "97", "--out", str(tmp_path / "run")])
    assert "--inner-steps" in capsys.readouterr().err
