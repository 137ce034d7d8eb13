"""The reranker of logged pages learns what users like, not where it stood."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.special import expit

from services.ranking.models.reranker import Reranker, RerankerModel, write_reranker
from services.ranking.state.item_stats import DAY
from tests.support.fits import Fits
from training.core.metrics import BANDS
from training.evaluation.page_likelihood import page_likelihood, page_slices
from training.examples.ranking_groups import RankingGroups
from training.ranking import page_reranker
from training.ranking.conditional_logit import fit_choice
from training.ranking.page_reranker import (
    LoggedPages,
    center_on_pages,
    fit_page_reranker,
    improves_likelihood,
)

pytestmark = pytest.mark.usefixtures("single_thread")
TWO = ("fame", "taste")
SIZE = 10


def lists(matrix: np.ndarray, grade: np.ndarray, days: int = 10) -> RankingGroups:
    """Lists of ten rows, as many on each day."""
    count = len(matrix) // SIZE
    weight = np.ones(len(matrix), np.float32)
    time = np.arange(count) * days // count * DAY
    return RankingGroups(matrix, grade.astype(np.float32), weight, np.full(count, SIZE), time)


def pages_of(groups: RankingGroups) -> LoggedPages:
    """Pages whose rows are in the order of their positions."""
    return LoggedPages(groups, np.tile(np.arange(1, SIZE + 1), len(groups.size)))


def no_queries(columns: int = 2) -> RankingGroups:
    """One query, from which nothing can be learned."""
    return replace(lists(np.zeros((SIZE, columns), np.float32), np.zeros(SIZE)), time=np.zeros(1, np.int64))


def gain_of(model: RerankerModel, column: int, low: float = 0.0, high: float = 1.0) -> float:
    """How much a column raises the score of rows whose other column is .5."""
    rows = np.full((2, 2), 0.5, np.float32)
    rows[:, column] = low, high
    before, after = model.score(rows)
    return float(after - before)


def pages_by_fame(pages: int, slope: float = 2.0) -> LoggedPages:
    """The shop sorts by fame; users look at the first places, and click what they like of what they see."""
    random = np.random.default_rng(0)
    rows = random.random((pages, SIZE, 2)).astype(np.float32)
    rows = np.take_along_axis(rows, np.argsort(-rows[:, :, :1], axis=1), axis=1)
    is_seen = random.random((pages, SIZE)) < np.arange(1, SIZE + 1) ** -0.8
    is_click = is_seen & (random.random((pages, SIZE)) < expit(slope * rows[:, :, 1] - 1.5))
    return pages_of(lists(rows.reshape(-1, 2), is_click.ravel()))


def test_what_stands_first_is_not_taken_for_what_is_liked() -> None:
    pages = pages_by_fame(3000)
    blind = LoggedPages(pages.groups, np.ones_like(pages.position))
    with_positions, without = (fit_page_reranker(no_queries(), p, TWO, 0) for p in (pages, blind))
    assert abs(gain_of(with_positions, 0)) < 0.25 * gain_of(with_positions, 1)
    assert gain_of(without, 0) > gain_of(without, 1)


def test_a_score_is_a_logit_up_to_a_constant() -> None:
    """On a page that every user sees whole, the difference of two scores is that of their log odds."""
    random = np.random.default_rng(0)
    matrix = random.random((40_000, 2)).astype(np.float32)
    is_click = random.random(40_000) < expit(2 * matrix[:, 1] - 1.5)
    for trees in (0, 50):
        model = fit_page_reranker(no_queries(), pages_of(lists(matrix, is_click)), TWO, trees)
        assert gain_of(model, 1) == pytest.approx(2, abs=0.3)


def test_ignored_impressions_count_more_than_sampled_negatives() -> None:
    """Lists of all there is and of what was on offer: fame decides what is, taste what is taken of it."""
    random = np.random.default_rng(0)
    matrix = random.random((40_000, 2)).astype(np.float32)
    fame, taste = matrix.T
    is_offered = random.random(40_000) < fame**2
    is_taken = is_offered & (random.random(40_000) < taste)
    sample = np.flatnonzero(is_offered)[:10_000]
    queries, pages = lists(matrix, is_taken), pages_of(lists(matrix[sample], is_taken[sample]))
    model = fit_page_reranker(queries, pages, TWO, 40)
    alone = fit_choice(queries, TWO).terms(np.array([[0, 0.5], [1, 0.5], [0.5, 0], [0.5, 1]], np.float32))
    fame_of_queries, taste_of_queries = (float((alone[b] - alone[a]).sum()) for a, b in ((0, 1), (2, 3)))
    share = gain_of(model, 0) / gain_of(model, 1)
    assert 0 < share < 0.8 * fame_of_queries / taste_of_queries


def liking_of_the_middle(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of two columns, and a taste for what is neither low nor high in the first, which no sum knows."""
    random = np.random.default_rng(0)
    matrix = random.normal(0, 1, (count, 2)).astype(np.float32)
    return matrix, random.random(count) < 0.3 * (np.abs(matrix[:, 0]) < 0.7)


def test_trees_grow_only_for_nonlinear_effects() -> None:
    pages = pages_of(lists(*liking_of_the_middle(20_000)))
    assert fit_page_reranker(no_queries(), pages, TWO, 20).trees is not None
    random = np.random.default_rng(0)
    sign = np.sign(pages.groups.matrix)
    is_click = random.random(len(sign)) < expit(2 * sign[:, 0] - 2)  # a sum of one column says it all
    plain = pages_of(lists(sign, is_click))
    assert fit_page_reranker(no_queries(), plain, TWO, 20).trees is None


def test_who_clicks_much_is_no_reason_for_trees() -> None:
    """A column of the user is the same for a whole page: it says how much is clicked there, and not what."""
    random = np.random.default_rng(0)
    matrix = random.normal(0, 1, (20_000, 2)).astype(np.float32)
    matrix[:, 0] = np.repeat(matrix[::SIZE, 0], SIZE)
    is_click = random.random(20_000) < 0.05 + 0.5 * (np.abs(matrix[:, 0]) < 0.7)
    assert fit_page_reranker(no_queries(), pages_of(lists(matrix, is_click)), TWO, 20).trees is None


@pytest.mark.parametrize("deviation", [0.1, 3.0, 20.0])
def test_centered_logits_expect_as_many_engagements_as_there_are(deviation: float) -> None:
    random = np.random.default_rng(0)
    pages, logit = noise(1), random.normal(2, deviation, 8000)
    engaged = pages.by_page(pages.engaged.astype(np.float64))
    result = center_on_pages(pages, logit)
    np.testing.assert_allclose(pages.by_page(expit(result)), engaged, atol=2e-3)
    shift = (result - logit).reshape(-1, SIZE)
    np.testing.assert_allclose(shift, shift[:, :1].repeat(SIZE, 1))  # the order of a page stays


def noise(seed: int, days: int = 10) -> LoggedPages:
    """Pages that nothing tells apart."""
    random = np.random.default_rng(seed)
    return pages_of(lists(random.random((8000, 2)).astype(np.float32), random.random(8000) < 0.2, days))


def test_noise_mostly_gives_no_trees() -> None:
    """One in forty gains two standard errors by chance; of the best of forty numbers it would be half."""
    has_trees = [
        fit_page_reranker(no_queries(), noise(seed), TWO, 50).trees is not None for seed in range(16)
    ]
    assert sum(has_trees) <= 3


def test_an_exact_number_of_trees_is_not_questioned() -> None:
    assert fit_page_reranker(no_queries(), noise(0), TWO, 0, exact=True).tree_count == 0
    assert fit_page_reranker(no_queries(), noise(0), TWO, 7, exact=True).tree_count == 7


@pytest.mark.parametrize("days", [1, 2, 10])
def test_some_pages_are_always_held_out(days: int) -> None:
    trees = fit_page_reranker(no_queries(), noise(0, days), TWO, 200).trees
    assert trees is None or trees.num_trees() < 100


def test_the_number_of_trees_is_validated_on_unseen_days(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, is_click = liking_of_the_middle(10_000)
    pages, queries = pages_of(lists(matrix, is_click, days=5)), lists(matrix, is_click, days=4)
    pages = replace(pages, groups=replace(pages.groups, time=np.arange(1000) * DAY // 240))  # 240 a day
    fits = Fits(monkeypatch, page_reranker)
    model = fit_page_reranker(queries, pages, TWO, 20)
    # The fifth is cut at 800 of 1,000; the day begins at 720.
    early = int((queries.time < 3 * DAY).sum())
    assert [len(groups.size) for groups in fits.groups] == [early + 720, len(queries.size) + 1000]
    np.testing.assert_allclose(fits.groups[1].grade[: len(queries.grade)], 0.1 * queries.grade)
    np.testing.assert_array_equal(fits.groups[1].grade[len(queries.grade) :], pages.groups.grade)
    (training, validation), (final,) = fits.tree_rows
    shows_choice = np.repeat(pages.shows_choice, SIZE)
    for (data, _), span in ((training, slice(7200)), (validation, slice(7200, None)), (final, slice(None))):
        np.testing.assert_array_equal(data, matrix[span][shows_choice[span]])
    # Trees start from the scores of the choice model and effects of each position and of each page.
    rest = (final[1] - model.choice.terms(matrix[shows_choice]).sum(1)).reshape(-1, SIZE)
    of_position = rest - rest[:, :1]
    np.testing.assert_allclose(of_position, np.broadcast_to(of_position[0], rest.shape), atol=1e-4)
    assert model.trees is not None


def test_a_served_model_scores_as_the_one_that_was_validated(tmp_path: Path) -> None:
    """A booster of a binary objective predicts probabilities unless it is asked for logits."""
    matrix, is_click = liking_of_the_middle(20_000)
    model = fit_page_reranker(no_queries(), pages_of(lists(matrix, is_click)), TWO, 50)
    assert model.trees is not None
    raw = np.asarray(model.trees.predict(matrix, raw_score=True))
    assert raw.min() < -0.5
    np.testing.assert_allclose(model.score(matrix), model.choice.terms(matrix).sum(1) + raw, atol=1e-5)
    write_reranker(tmp_path, model)
    np.testing.assert_allclose(Reranker(tmp_path, TWO).score(matrix), model.score(matrix), atol=1e-5)
    middle, edge = model.score(np.array([[0, 0], [2, 0]], np.float32))
    chance = np.log(0.3 / 0.7)  # in the middle; nothing is taken at the edge
    assert middle > edge + 2 > chance


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("clicks", [0, 1, SIZE])
def test_a_few_pages_suffice_for_a_model(count: int, clicks: int) -> None:
    matrix = np.random.default_rng(0).random((SIZE * count, 2)).astype(np.float32)
    few = pages_of(lists(matrix, np.arange(SIZE * count) % SIZE < clicks))
    model = fit_page_reranker(few.groups, few, TWO, 5)
    assert np.isfinite(model.score(matrix)).all()
    assert model.trees is None or count > 1


def test_a_column_earns_its_place_by_the_likelihood_of_later_pages() -> None:
    random = np.random.default_rng(0)
    matrix = random.random((20_000, 2)).astype(np.float32)
    is_click = random.random(20_000) < expit(2 * matrix[:, 1] - 1.5)
    pages, tested = pages_of(lists(matrix, is_click)), np.array([False, True])
    assert improves_likelihood(no_queries(), pages, TWO, tested)
    assert not improves_likelihood(no_queries(), pages, TWO, ~tested)
    one = pages.take(np.arange(2000) == 0)
    assert improves_likelihood(no_queries(), one, TWO, ~tested)  # too little to decide


def test_a_gain_that_is_certain_but_tiny_earns_no_place(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    random = np.random.default_rng(0)
    matrix = random.random((400_000, 2)).astype(np.float32)
    is_click = random.random(400_000) < expit(0.1 * matrix[:, 1] - 1.5)
    pages = pages_of(lists(matrix, is_click))
    assert not improves_likelihood(no_queries(), pages, TWO, np.array([False, True]))
    gain, error = (float(caplog.messages[-1].split(part)[1].split()[0].rstrip(",")) for part in ("gain", "±"))
    assert 0.0005 > gain > error


def test_likelihood_tells_what_was_liked_from_what_stood_first() -> None:
    pages = pages_by_fame(2000)
    fame, taste = pages.groups.matrix.T.astype(np.float64)
    rarely = np.where(np.arange(len(taste)) % 3 == 0, 0.5, taste)
    scores = {"whole bundle": taste, "fame": fame, "rarely known": rarely, "constant": np.zeros(len(fame))}
    methods = page_likelihood(scores, pages)
    assert list(methods) == ["position alone", *scores]
    assert methods["whole bundle"]["gained"]["ci95"][0] > 0.002
    assert methods["fame"]["gained"]["ci95"][0] < 0.001  # the position says it already
    assert 0 < methods["rarely known"]["gained"]["mean"] < methods["whole bundle"]["gained"]["mean"]
    assert methods["constant"]["gained"]["mean"] == pytest.approx(0, abs=1e-4)
    assert methods["whole bundle"]["lost"]["ci95"] == [0, 0]
    for of_method in methods.values():
        lost = methods["whole bundle"]["log_likelihood"]["mean"] - of_method["log_likelihood"]["mean"]
        assert of_method["lost"]["mean"] == pytest.approx(lost, abs=2e-5)


def test_three_pages_tell_nothing() -> None:
    pages, score = pages_by_fame(3), np.zeros(3 * SIZE)
    assert page_likelihood({"whole bundle": score}, pages) == {}
    assert page_slices(score, pages, np.ones(3, bool), np.full(3 * SIZE, "head")) == {}


PLACES = dict(
    zip(
        (1, 2, 3, 4, 5, 6, 10, 11, 30, 0),
        ("1", "2", "3", "4-5", "4-5", "6-10", "6-10", "11+", "11+", "unknown"),
        strict=True,
    )
)


def sliced_pages(count: int) -> tuple[LoggedPages, dict[str, np.ndarray]]:
    """Pages that nothing tells apart, and the slices of their rows by position, user and item."""
    random = np.random.default_rng(0)
    rows = SIZE * count
    groups = lists(np.zeros((rows, 1), np.float32), random.random(rows) < 0.3)
    pages = LoggedPages(groups, np.tile(list(PLACES), count))
    return pages, {
        "position": np.tile(list(PLACES.values()), count),
        "user": np.repeat(np.where(random.random(count) < 0.5, "returning", "new"), SIZE),
        "item": random.choice(BANDS, rows),
    }


@pytest.mark.parametrize(
    ("kind", "known"),
    [
        *(("position", name) for name in dict.fromkeys(PLACES.values())),
        *(("user", name) for name in ("returning", "new")),
        *(("item", name) for name in BANDS),
    ],
)
def test_scores_gain_in_the_slice_that_they_know(kind: str, known: str) -> None:
    pages, slices = sliced_pages(1500)
    noise = np.random.default_rng(1).normal(0, 1, len(pages.engaged))
    score = np.where(slices[kind] == known, 4 * (pages.engaged - 0.3) + noise, 0)
    is_returning = slices["user"][::SIZE] == "returning"
    result = page_slices(score, pages, is_returning, slices["item"])
    names = {"position": [*PLACES.values()], "user": ["returning", "new"], "item": BANDS}
    assert {of: [*result[of]] for of in result} == {of: [*dict.fromkeys(names[of])] for of in names}
    gains = {name: of["gained"]["mean"] for name, of in result[kind].items()}
    assert result[kind][known]["gained"]["ci95"][0] > 0.25
    # With the number of engagements of a page given, its other rows are better known too, but only a little.
    assert all(-0.01 < gain < 0.2 * gains[known] for name, gain in gains.items() if name != known)
    shows_choice = np.repeat(pages.shows_choice, SIZE)
    for of, by_slice in result.items():
        for name, figures in by_slice.items():
            assert figures["rows"] == np.count_nonzero((slices[of] == name) & shows_choice)


def test_slices_add_up_to_the_gain_of_all_rows() -> None:
    pages, slices = sliced_pages(500)
    score = pages.engaged + np.random.default_rng(1).normal(0, 1, len(pages.engaged))
    result = page_slices(score, pages, slices["user"][::SIZE] == "returning", slices["item"])
    whole = page_likelihood({"whole bundle": score}, pages)["whole bundle"]["gained"]
    for kind in ("position", "user"):  # as many rows of each on every page that has any
        rows, gained = zip(*((of["rows"], of["gained"]["mean"]) for of in result[kind].values()), strict=True)
        assert np.average(gained, weights=rows) == pytest.approx(whole["mean"], abs=2e-5)
    assert sum(of["gained"]["n"] for of in result["user"].values()) == whole["n"]


def test_a_slice_of_few_pages_has_no_interval_and_one_without_rows_is_left_out() -> None:
    pages = pages_by_fame(200)
    bands = np.full(200 * SIZE, "head")
    first_rows = np.flatnonzero(np.repeat(pages.shows_choice, SIZE))[::SIZE]
    bands[first_rows[:3]] = "tail"
    is_returning = np.zeros(200, bool)
    result = page_slices(pages.groups.matrix[:, 1].astype(np.float64), pages, is_returning, bands)
    assert list(result["position"]) == ["1", "2", "3", "4-5", "6-10"]
    assert list(result["user"]) == ["new"]
    assert list(result["item"]) == ["head", "tail"]
    assert result["item"]["tail"] == {"gained": None, "rows": 3}
    bands[first_rows[3]] = "tail"
    result = page_slices(pages.groups.matrix[:, 1].astype(np.float64), pages, is_returning, bands)
    assert result["item"]["tail"]["gained"]["n"] == 4


def test_pages_without_a_choice_are_left_out() -> None:
    """A shop where most pages end without a click learns from the others as if they were all."""
    matrix, is_click = liking_of_the_middle(20_000)
    is_click[::SIZE], is_click[1::SIZE] = True, False  # every page shows a choice
    pages = pages_of(lists(matrix, is_click))
    others = pages_of(
        lists(np.random.default_rng(1).normal(0, 1, (40_000, 2)).astype(np.float32), np.zeros(40_000))
    )
    order = np.argsort(np.concatenate([pages.groups.time, others.groups.time]), kind="stable")
    rows = (order[:, None] * SIZE + np.arange(SIZE)).ravel()
    grade = np.concatenate([pages.groups.grade, others.groups.grade])[rows]
    mixed = pages_of(lists(np.concatenate([pages.groups.matrix, others.groups.matrix])[rows], grade))
    assert mixed.shows_choice.sum() == len(pages.groups.size)
    for of in (pages, mixed):
        assert fit_page_reranker(no_queries(), of, TWO, 20).trees is not None
    scores = {"whole bundle": mixed.groups.matrix[:, 0].astype(np.float64)}
    likelihood = page_likelihood(scores, mixed)["whole bundle"]["log_likelihood"]
    assert likelihood["n"] == len(pages.groups.size)
