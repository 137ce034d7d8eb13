"""Data sets of ratings: MovieLens."""

import json

from training.data.presets.columns import parts_of, rebuild, texts
from training.data.presets.preset import Preset, TableSource
from training.data.readers.reader import Dialect, Note, Table

_LIKED = 4.0
_EXAMPLES = 5
_MOVIE_COLUMNS = (("movieId",), ("title",), ("genres",))
_RATING_COLUMNS = (("userId",), ("movieId",), ("rating",), ("timestamp",))


def _movies(table: Table) -> Table:
    """movies.csv and movies.dat: the title holds the year, genres are parted by |."""
    ids, titles = texts(table, "movieId"), texts(table, "title")
    genres = [parts_of(value, "|") for value in texts(table, "genres")]
    rows = [row for row, item_id in enumerate(ids) if item_id]
    columns: dict[str, list[object]] = {
        "id": [ids[row] for row in rows],
        "title": [titles[row] for row in rows],
        "genres": [json.dumps([g for g in genres[row] if g != "(no genres listed)"]) for row in rows],
    }
    return rebuild(table, rows, columns)


def _ratings(table: Table) -> Table:
    """ratings.csv and ratings.dat: four stars and more are a like, fewer are a view."""
    stars = [_number(value) for value in texts(table, "rating")]
    rows = [row for row, value in enumerate(stars) if value is not None]
    invalid_rows = [row for row, value in enumerate(stars) if value is None]
    lines = tuple(int(table.lines[row]) for row in invalid_rows[:_EXAMPLES])
    notes = [Note("loss", "rating is no number", len(invalid_rows), lines)] if invalid_rows else []
    names = {"user_id": "userId", "item_id": "movieId", "time": "timestamp"}
    cells = {new: texts(table, old) for new, old in names.items()}
    columns = {name: [values[row] for row in rows] for name, values in cells.items()}
    columns["type"] = ["like" if (stars[row] or 0) >= _LIKED else "view" for row in rows]
    return rebuild(table, rows, columns, notes)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


MOVIELENS = Preset(
    "movielens",
    "MovieLens: movies.csv and ratings.csv, or movies.dat and ratings.dat",
    frozenset({"userId", "movieId", "rating"}),
    [
        TableSource(("movies.csv*",), _movies, required=_MOVIE_COLUMNS),
        TableSource(("movies.dat*",), _movies, Dialect("::", columns=("movieId", "title", "genres"))),
    ],
    [
        TableSource(("ratings.csv*",), _ratings, required=_RATING_COLUMNS),
        TableSource(
            ("ratings.dat*",), _ratings, Dialect("::", columns=("userId", "movieId", "rating", "timestamp"))
        ),
    ],
    {"event_types": {"view": 0.2, "like": 1.0}, "events": {"default_type": "view"}},
)
