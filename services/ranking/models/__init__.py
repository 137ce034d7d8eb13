"""Models that training fits and ranking loads."""
