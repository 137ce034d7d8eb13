"""Photographs of a shop: files or tars of ITEM_ID.ext, found by name and read when needed."""

import tarfile
from pathlib import Path

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif"})


class Photographs:
    """The photographs under a directory, which need not exist; of two with one name the first counts."""

    def __init__(self, directory: Path) -> None:
        self._places: dict[str, tuple[Path, int, int]] = {}
        for path in sorted(p for p in directory.rglob("*") if p.is_file()):
            if path.suffix == ".tar":
                self._index(path)
            elif path.suffix.lower() in EXTENSIONS:
                self._places.setdefault(path.stem, (path, 0, path.stat().st_size))

    def _index(self, path: Path) -> None:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                name = Path(member.name)
                if member.isfile() and name.suffix.lower() in EXTENSIONS:
                    self._places.setdefault(name.stem, (path, member.offset_data, member.size))

    def __contains__(self, item_id: str) -> bool:
        return item_id in self._places

    def __len__(self) -> int:
        return len(self._places)

    def stamp(self, item_id: str) -> str:
        """What changes when an item's file does: its place, size and time of writing."""
        path, offset, size = self._places[item_id]
        return f"{path.name} {offset} {size} {path.stat().st_mtime_ns}"

    def read(self, item_id: str) -> bytes:
        """The file of an item; KeyError when it has none."""
        path, offset, size = self._places[item_id]
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(size)
