"""Decisions of a training run: whether a learned part replaces a simpler one, by held-out data."""

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np

from training.core import metrics
from training.core.metrics import Interval

MIN_QUERIES = 100
"""Fewer held-out queries do not decide: the simpler part stays."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Decision:
    """Whether `part` is used instead of `baseline`, by its `gain` in `measure`.

    `queries` counts the held-out queries; `gain` is None without any. A `reason` is why it is used although
    the gain is not shown.
    """

    part: str
    baseline: str
    measure: str
    accepted: bool
    queries: int
    gain: Interval | None
    reason: str = ""

    @property
    def is_thin(self) -> bool:
        """Whether there are too few queries to tell."""
        return self.queries < MIN_QUERIES

    def __str__(self) -> str:
        because = f", because {self.reason}" if self.reason else ""
        verdict = f"is used{because}" if self.accepted else f"is left out in favor of {self.baseline}"
        if self.gain is None or self.is_thin:
            return f"{self.part}: too few to tell ({self.queries:,} held-out queries): it {verdict}"
        change = f"{self.gain.mean:+.3f} [{self.gain.low:+.3f}, {self.gain.high:+.3f}]"
        return (
            f"{self.part}: {change} {self.measure} against {self.baseline} on {self.queries:,} held-out "
            f"queries: it {verdict}"
        )

    def log(self) -> None:
        """Log the decision, as a warning unless the part is used and its gain is shown."""
        is_shown = self.accepted and not self.is_thin and not self.reason
        level = logging.INFO if is_shown else logging.WARNING
        _log.log(level, "%s", self)

    def to_dict(self) -> dict[str, Any]:
        """The form used in reports."""
        return {
            "part": self.part,
            "baseline": self.baseline,
            "measure": self.measure,
            "accepted": self.accepted,
            "queries": self.queries,
            "gain": self.gain.to_dict() if self.gain else None,
            "text": str(self),
        }


def decide(
    part: str, baseline: str, measure: str, values: np.ndarray, baseline_values: np.ndarray
) -> Decision:
    """Use `part` if a 95% interval of its gain is above 0; both values (Q,) are of the same queries.

    With fewer than 100 queries the answer is no.
    """
    count = len(values)
    gain = metrics.paired_interval(values, baseline_values) if count else None
    accepted = count >= MIN_QUERIES and gain is not None and gain.low > 0
    return Decision(part, baseline, measure, accepted, count, gain)
