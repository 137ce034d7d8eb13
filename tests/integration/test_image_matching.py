"""Image files are matched to items, and the report lists the rest."""

import io
import tarfile
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.core.errors import FailedPrecondition, InvalidArgument
from tests.support.image_bombs import encode_image, smooth_image
from training.data.image_matching import match, references
from training.data.images import ShopImages
from training.encoders import image_cache

IDS = st.text("aAbB1", min_size=1, max_size=4)


def match_files(files: list[str], *ids: str) -> dict[str, str]:
    return match(files, dict.fromkeys(ids, ())).of_item


@pytest.mark.parametrize(
    ("name", "item_id"),
    [
        ("sku-1.jpg", "sku-1"),
        ("sku-1_1.jpg", "sku-1"),
        ("sku-1-2.webp", "sku-1"),
        ("sku-1 (3).png", "sku-1"),
        ("sku-1.4.png", "sku-1"),
        ("SKU-1.JPG", "sku-1"),
        ("Sku-1_1.jpg", "sku-1"),
        ("2024/05/sku-1.jpg", "sku-1"),
        ("sku-1/1.jpg", "sku-1"),
        ("SKU-1/front.jpg", "sku-1"),
        ("photos.zip/sku-1/front.jpg", "sku-1"),
        ("cafe\u0301.jpg", "café"),
    ],
)
def test_a_file_belongs_to_the_item_of_its_name(name: str, item_id: str) -> None:
    assert match_files([name], item_id, "sku-2") == {item_id: name}


@pytest.mark.parametrize(
    "name", ["sku-10.jpg", "xsku-1.jpg", "sku-1front.jpg", "sku_.jpg", "other/front.jpg"]
)
def test_a_name_that_only_resembles_an_id_fits_none(name: str) -> None:
    result = match([name], {"sku-1": (), "sku-2": ()})
    assert (result.of_item, result.unmatched) == ({}, [name])


def test_the_exact_name_wins_and_then_the_lowest_number() -> None:
    names = ["a_10.jpg", "a_2.jpg", "a-3.jpg", "a/0.jpg", "A.jpg"]
    result = match(names, {"a": ()})
    assert result.of_item == {"a": "a_2.jpg"}
    assert result.further == sorted(set(names) - {"a_2.jpg"})
    assert match_files([*names, "z/a.png"], "a") == {"a": "z/a.png"}


@pytest.mark.parametrize(
    "name",
    [
        "2024/11/x.png",
        "2024/11/05/x.png",
        "up/2019/3/x.png",
        "1/1/x.png",
        "m/b/x.png",
        "1/x.png",
        "11/a/x.png",
    ],
)
def test_a_folder_of_uploads_is_no_item(name: str) -> None:
    result = match([name], dict.fromkeys(("11", "5", "3", "1", "b", "2024"), ()))
    assert (result.of_item, result.unmatched) == ({}, [name])


def test_folders_of_items_are_counted_and_may_be_numbers() -> None:
    names = [f"{number}/front.png" for number in range(1, 12)]
    result = match([*names, "12.png"], dict.fromkeys(map(str, range(1, 13)), ()))
    assert result.of_item == {str(n): f"{n}/front.png" for n in range(1, 12)} | {"12": "12.png"}
    assert result.by_folder == 11


def test_the_summary_counts_images_matched_by_their_folder_alone(tmp_path: Path) -> None:
    (tmp_path / "sku").mkdir()
    (tmp_path / "sku" / "front.png").write_bytes(b"x")
    photographs = ShopImages(tmp_path)
    photographs.assign(["sku", "other"])
    assert (
        "1 of 2 items have an image (1 of them by the name of its folder alone)" in photographs.report.summary
    )


def test_an_id_that_ends_in_a_number_keeps_its_file() -> None:
    assert match_files(["a_1.jpg"], "a", "a_1") == {"a_1": "a_1.jpg"}
    assert match_files(["a_1.jpg", "a_1_2.jpg"], "a", "a_1") == {"a_1": "a_1.jpg"}
    assert match_files(["a_1.jpg", "a_2.jpg"], "a", "a_1") == {"a_1": "a_1.jpg", "a": "a_2.jpg"}


def test_case_distinguishes_ids_that_differ_only_in_case() -> None:
    assert match_files(["ab.jpg", "AB.jpg"], "ab", "AB") == {"ab": "ab.jpg", "AB": "AB.jpg"}
    assert match_files(["Ab.jpg"], "ab", "AB") == {}


@given(ids=st.sets(IDS, max_size=5), files=st.lists(IDS.map(lambda stem: f"{stem}.jpg"), max_size=8))
def test_every_file_is_accounted_for_once(ids: set[str], files: list[str]) -> None:
    names = sorted(set(files))
    result = match(names, dict.fromkeys(ids, ()))
    assert sorted([*result.of_item.values(), *result.further, *result.unmatched]) == names
    assert result.of_item.keys() <= ids
    for item_id in ids & {name.removesuffix(".jpg") for name in names}:
        assert result.of_item[item_id] == f"{item_id}.jpg"


@pytest.mark.parametrize(
    ("cell", "file_name"),
    [
        ("front.jpg", "2024/front.jpg"),
        ("images/2024/front.jpg", "2024/front.jpg"),
        ("C:\\photos\\FRONT.JPG", "2024/front.jpg"),
        ("gone.jpg, front.jpg", "2024/front.jpg"),
        ("gone.jpg|front.jpg", "2024/front.jpg"),
        ("gone.jpg; front.jpg", "2024/front.jpg"),
        ('["gone.jpg", "front.jpg"]', "2024/front.jpg"),
        (["gone.jpg", "front.jpg"], "2024/front.jpg"),
        ("a,b.jpg", "a,b.jpg"),
        ("https://cdn.example.com/x/front.jpg?v=3", "2024/front.jpg"),
        ("//cdn.example.com/my%20hat.jpg", "my hat.jpg"),
    ],
)
def test_a_column_names_a_file(cell: object, file_name: str) -> None:
    files = ["2024/front.jpg", "a,b.jpg", "my hat.jpg", "x.jpg"]
    assert match(files, {"x": (cell,)}).of_item == {"x": file_name}


def test_missing_files_that_a_column_names_are_counted() -> None:
    cells = {"a": ("a.png",), "b": ("https://cdn.example.com/b.png",), "c": (None,), "d": ("none.jpg",)}
    result = match(["d.jpg"], cells)
    assert result.of_item == {"d": "d.jpg"}  # by its name, though the column is wrong
    assert (result.missing, result.addresses) == ({"a": "a.png"}, {"b": "https://cdn.example.com/b.png"})
    assert references("[no json") == ["[no json"]


def _tar(path: Path, mode: str, files: dict[str, bytes]) -> None:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


FILES = {f"deep/{n}.jpg": bytes([n]) * (50 + n) for n in range(20)}


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.TGZ", "a.tar.bz2", "a.tar.xz", "a.zip", "folder"])
def test_files_are_read_from_folders_and_archives(tmp_path: Path, name: str) -> None:
    if name == "folder":
        for path, content in FILES.items():
            (tmp_path / path).parent.mkdir(exist_ok=True)
            (tmp_path / path).write_bytes(content)
    elif name.endswith(".zip"):
        with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as archive:
            for path, content in FILES.items():
                archive.writestr(path, content)
    else:
        kind = name.rpartition(".")[2].lower().replace("tgz", "gz")
        _tar(tmp_path / name, "w" if kind == "tar" else f"w:{kind}", FILES)
    photographs = ShopImages(tmp_path)
    photographs.assign([str(n) for n in range(25)])
    assert {item_id: photographs.read(item_id) for item_id in map(str, range(20))} == {
        str(n): bytes([n]) * (50 + n) for n in range(20)
    }
    assert (len(photographs), "20" in photographs) == (20, False)
    assert len({photographs.stamp(str(n)) for n in range(20)}) == 20
    assert "20 files, 20 match an item; 20 of 25 items have an image" in photographs.report.summary


@pytest.mark.parametrize("name", ["a.tar.gz", "a.zip", "a.tar"])
def test_a_damaged_archive_is_named(tmp_path: Path, name: str) -> None:
    _tar(tmp_path / "whole", "w:gz", {"a.jpg": bytes(range(256)) * 400})
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / name).write_bytes((tmp_path / "whole").read_bytes()[:300])
    with pytest.raises(FailedPrecondition, match=f"{name} cannot be read as an archive"):
        ShopImages(tmp_path / "images")


def test_the_report_counts_and_names_unused_files(tmp_path: Path) -> None:
    for name in ("a.jpg", "a_2.jpg", "b.png", "z.jpg", "c.tiff", "note", "._a.jpg"):
        (tmp_path / name).write_bytes(b"x")
    photographs = ShopImages(tmp_path)
    ids, urls = ["a", "b", "c", "d"], ["", "b.png", "gone.png", "https://cdn.example.com/d.jpg"]
    photographs.assign(ids, urls)
    report = photographs.report
    assert report.summary == (
        "images: 4 files, 3 match an item; 2 of 4 items have an image, 1 files are additional images and are "
        "not used"
    )
    for expected, problem in zip(
        (
            "1 image files match no item (z.jpg)",
            "3 files have no image extension (.jpg 1, .tiff 1, no extension 1; ._a.jpg, c.tiff, note)",
            "1 items name an image file that does not exist (c: gone.png)",
            "1 items name their image only by a URL (d: https://cdn.example.com/d.jpg)",
        ),
        report.problems,
        strict=True,
    ):
        assert problem.startswith(expected)


def test_unreadable_files_are_named_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"<html>403 Forbidden</html>")
    (tmp_path / "b.avif").write_bytes(encode_image(smooth_image(90, 80), "AVIF"))
    (tmp_path / "c.png").write_bytes(encode_image(smooth_image(90, 80), "PNG")[:80])
    photographs = ShopImages(tmp_path)
    first, second = image_cache.unreadable_files(photographs, ["a", "b", "c", "d"])
    assert first.startswith("a.jpg: is not a readable JPEG, PNG, GIF, WebP, AVIF or HEIC file: it is an HTML")
    assert second.startswith("c.png: is damaged")


def test_a_deleted_file_is_unreadable_but_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"x")
    photographs = ShopImages(tmp_path)
    (tmp_path / "a.jpg").unlink()
    with pytest.raises(InvalidArgument, match=r"a\.jpg: cannot be read"):
        photographs.read("a")
