"""The report of `vitrine inspect` on a shop directory, and the verdict whether training may start."""
