"""Tar shards: what is found in them is what tarfile finds; what is wrong with them is said by name."""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import random
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from classification.data.folders import read_folder
from classification.data.image_files import file_digest, identical_pairs
from classification.data.images import image_size, read_image, read_image_or_cause
from classification.data.inference import find_paths
from classification.data.lists import read_list
from classification.data.members import file_size, image_exists, open_image, parse_member
from classification.data.tar_shards import read_shards, shard_images
from classification.errors import UserError

Files = list[tuple[str, bytes]]


def picture(shade: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (5, 4), (shade, 10, 20)).save(file, "png")
    return file.getvalue()


def pack(path: Path, files: Files, form: int = tarfile.GNU_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def special(path: Path, kind: bytes, name: str = "1.png", link: str = "") -> Path:
    """A shard whose second file is of another kind."""
    with tarfile.open(path, "w") as tar:
        for label in (0, 1):
            info = tarfile.TarInfo(name if label else "0.png")
            content = picture() if not label else b""
            info.size, info.type, info.linkname = len(content), kind if label else tarfile.REGTYPE, link
            tar.addfile(info, io.BytesIO(content))
    return path


GOOD: Files = [(f"{index:03d}.{kind}", content) for index in range(4) for kind, content in
               (("png", picture(index)), ("cls", b"%d\n" % (index % 3)))]  # fmt: skip


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_images_and_labels_are_those_that_tarfile_finds(form: int, tmp_path: Path) -> None:
    deep = "d" * 90 + "/" + "e" * 60
    more: Files = [(f"{deep}/{index}.PNG", picture(50 + index)) for index in range(2)]
    more = [part for image in more for part in (image, (image[0][:-3] + "cls", b" 2"))]
    if form != tarfile.USTAR_FORMAT:
        more += [("ü" * 150 + "/x.png", picture(90)), ("ü" * 150 + "/x.cls", b"1")]
    shard = pack(tmp_path / "a.tar", [*GOOD, *more], form)
    found = read_shards([shard], 3)
    with tarfile.open(shard) as tar:
        wanted = [info for info in tar if info.name.lower().endswith(".png")]
        members = [parse_member(path) for path, _ in found]
        assert [(m.name, m.start, m.size) for m in members if m] == [(i.name, i.offset_data, i.size) for i in wanted]
        for info, (path, label) in zip(wanted, found, strict=True):
            content, said = tar.extractfile(info), tar.extractfile(info.name[:-3] + "cls")
            assert content is not None and said is not None
            with open_image(path) as file:
                assert file.read() == content.read()
            assert label == int(said.read()) and image_exists(path) and file_size(path) == info.size
    assert read_shards([shard], None, labels=False) == [(path, -1) for path, _ in found]
    assert shard_images([shard]) == {str(shard): [path for path, _ in found]}


def test_what_is_no_image_is_left_out(tmp_path: Path) -> None:
    files: Files = [
        ("./a/0.jpg", picture()), ("./a/0.cls", b"1"), ("./a/0.seg.png", picture()), ("./a/0.json", b"{}"),
        ("./a/._1.jpg", b"mac"), ("__MACOSX/2.jpg", b"mac"), ("3.txt", b"text"), ("b.c.png", picture()),
        ("b.cls", b"0"),
    ]  # fmt: skip
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        folder = tarfile.TarInfo("./a")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    found = [(path.partition("/0.")[0], path.rpartition("/")[2], label) for path, label in
             read_shards([tmp_path / "a.tar"], 2)]  # fmt: skip
    assert [(name, label) for _, name, label in found] == [("0.jpg", 1), ("b.c.png", 0)]
    assert found[0][0].endswith("/a")


def test_a_path_in_a_shard_is_read_like_any_other(tmp_path: Path) -> None:
    shard = pack(tmp_path / "a.tar", GOOD)
    paths = shard_images([shard])[str(shard)]
    alone = tmp_path / "alone.png"
    alone.write_bytes(picture(2))
    assert read_image(paths[2]).tobytes() == read_image(str(alone)).tobytes()
    assert image_size(paths[2]) == (4, 5) and file_digest(paths[2]) == file_digest(str(alone))
    assert identical_pairs([str(alone)], paths) == [(str(alone), paths[2])]
    (tmp_path / "list").write_text(f"{os.path.relpath(paths[1], tmp_path)} 2 -0.5\n")
    assert read_list(tmp_path / "list", tmp_path, 3) == [(paths[1], 2)]
    (tmp_path / "paths").write_text(f"{paths[3]}\n")
    words = [str(shard), str(tmp_path / "paths"), paths[0], str(tmp_path)]
    found = find_paths(words, io.BytesIO())
    assert found.paths == [*paths, paths[3], paths[0], str(alone), *paths]
    assert not any(".tar" in note for note in found.notes)
    pack(tmp_path / "b.TAR", GOOD)  # not a shard by its name, so it is left out, and a note says so
    assert "1 .tar" in find_paths([str(tmp_path)], io.BytesIO()).notes[0]


def test_a_shard_that_was_packed_again_is_not_read_at_old_places(tmp_path: Path) -> None:
    shard = pack(tmp_path / "a.tar", GOOD)
    path = shard_images([shard])[str(shard)][2]
    pack(shard, [("more.cls", b"1"), *GOOD])
    assert read_image_or_cause(path) == "its shard has another file at this place: perhaps it was packed again"
    pack(shard, [(f"more/{'n' * 120}.cls", b"1"), *GOOD])
    assert read_image_or_cause(path) == "its shard has another file at this place: perhaps it was packed again"
    pack(shard, [("more.cls", bytes(513)), *GOOD])
    assert read_image_or_cause(path) == (
        "its shard has no file at this place: perhaps it was packed again"
    ) and not image_exists(path)
    (tmp_path / "list").write_text("a.tar@512+99999999999999/x.png 1\n")
    with pytest.raises(UserError, match="is not a file in"):
        read_list(tmp_path / "list", tmp_path)


def cut(keep: int) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        content = pack(path, GOOD).read_bytes()
        path.write_bytes(content[:keep])
        return path

    return make


def with_size(size: bytes, kind: bytes = tarfile.REGTYPE) -> Callable[[Path], Path]:
    """A shard whose second header says another size, with a sum that is right."""

    def make(path: Path) -> Path:
        block = bytearray(pack(path, GOOD).read_bytes())
        start = 512 + 512 * -(-len(GOOD[0][1]) // 512)
        block[start + 124 : start + 136], block[start + 156 : start + 157] = size, kind
        block[start + 148 : start + 156] = b" " * 8
        block[start + 148 : start + 156] = b"%06o\0 " % sum(block[start : start + 512])
        path.write_bytes(block)
        return path

    return make


def with_record(path: Path, key: str, value: str) -> Path:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("0.png")
        info.size, info.pax_headers = len(picture()), {key: value}
        tar.addfile(info, io.BytesIO(picture()))
    return path


def joined(path: Path) -> Path:
    content = pack(path, GOOD).read_bytes()
    path.write_bytes(content * 2)
    return path


def written(content: bytes) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        path.write_bytes(content)
        return path

    return make


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: pack(p, [*GOOD, ("../out.png", picture())]), r"name '\.\./out\.png' could lead out of the folder"),
        (lambda p: pack(p, [("a/../../out.txt", b"")]), r"name 'a/\.\./\.\./out\.txt' could lead out of the folder"),
        (lambda p: pack(p, [("/etc/out.png", picture())]), "the name '/etc/out.png' could lead out of the folder"),
        (lambda p: pack(p, [("b.tar@1+2/x.png", picture())]), "could lead out of the folder"),
        (lambda p: special(p, tarfile.SYMTYPE, link="/etc/passwd"), "'1.png' is a link: pack plain files only"),
        (lambda p: special(p, tarfile.LNKTYPE, link="0.png"), "'1.png' is a link"),
        (lambda p: special(p, tarfile.CHRTYPE), "'1.png' is a device"),
        (lambda p: special(p, tarfile.BLKTYPE), "'1.png' is a device"),
        (lambda p: special(p, tarfile.FIFOTYPE), "'1.png' is a pipe"),
        (lambda p: special(p, tarfile.GNUTYPE_SPARSE), "'1.png' is a file with holes"),
        (lambda p: special(p, b"?"), "'1.png' is of an unknown kind"),
        (cut(1024 + 20), r"a\.tar is truncated: '000\.cls' ends|is truncated: it has no end mark"),
        (cut(512 + 30), r"a\.tar is truncated: '000\.png' ends [0-9]+ bytes after the end of the file: copy it again"),
        (cut(1024), "is truncated: it has no end mark after '000.png': copy it again"),
        (cut(2048), "is truncated: it has no end mark after '000.cls': copy it again"),
        (joined, "contains more after its end mark"),
        (written(b""), "a.tar is empty"),
        (written(b"\0" * 1024), "holds shards without images"),
        (written(b"no tar file" * 100), "a.tar is no tar file: expected a tar file as `tar -cf` makes it"),
        (lambda p: written(gzip.compress(pack(p, GOOD).read_bytes()))(p), "a.tar is compressed"),
        (with_size(b"\xff" * 12), "is damaged after '000.png', at byte 1024"),
        (with_size(b"\x80" + b"\x7f" * 11), "is truncated: '000.cls' ends"),
        (with_size(b"00077777777\0", tarfile.XHDTYPE), "has a header of 16777215 bytes, too many for a name"),
        (with_size(b"00000000002\0", tarfile.XHDTYPE), "has a header that cannot be read"),
        (lambda p: with_record(p, "size", "9" * 5000), "has a header that cannot be read"),
        (lambda p: with_record(p, "GNU.sparse.major", "1"), "has a header that cannot be read"),
        (lambda p: with_record(p, "path", "../x.png"), "could lead out of the folder"),
        (lambda p: pack(p, GOOD[:-1]), "'003.png' has no label: expected 003.cls beside it"),
        (lambda p: pack(p, [*GOOD[:-1], ("003.cls", b"sky")]), "'003.cls' must hold a class index, as 3; got 'sky'"),
        (lambda p: pack(p, [*GOOD[:-1], ("003.cls", b"")]), "'003.cls' must hold a class index, as 3; got ''"),
        (lambda p: pack(p, [*GOOD[:-1], ("003.cls", b"1" * 600)]), "got 600 bytes"),
        (lambda p: pack(p, [*GOOD[:-1], ("003.cls", b"3")]), "label 3 of '003.cls' must be below the number"),
        (lambda p: pack(p, [GOOD[0], ("000.jpg", picture()), GOOD[1]]), "'000.png' and '000.jpg' have one label"),
        (lambda p: pack(p, GOOD[1::2]), "holds shards without images: expected NAME.jpg and NAME.cls in each"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_shard_is_said_by_name(make: Callable[[Path], Path], message: str, tmp_path: Path) -> None:
    before = {tmp_path, tmp_path / "a.tar"}
    with pytest.raises(UserError, match=message) as raised:
        read_shards([make(tmp_path / "a.tar")], 3)
    assert str(tmp_path) in str(raised.value)
    assert {tmp_path, *tmp_path.rglob("*")} == before


def test_broken_bytes_are_refused_or_read_but_nothing_else_happens(tmp_path: Path) -> None:
    content = pack(tmp_path / "a.tar", GOOD, tarfile.PAX_FORMAT).read_bytes()
    rng = random.Random(0)
    refused = 0
    for _ in range(300):
        broken = bytearray(content[: rng.choice([len(content), rng.randrange(len(content))])])
        for _ in range(rng.randrange(4)):
            if broken:
                broken[rng.randrange(min(len(broken), 9000))] = rng.randrange(256)
        (tmp_path / "b.tar").write_bytes(broken)
        with contextlib.suppress(UserError):
            refused += 1
            for path, label in read_shards([tmp_path / "b.tar"], 3):
                assert 0 <= label < 3
                read_image_or_cause(path)
            refused -= 1
    assert 100 < refused < 300


def test_an_image_of_gigapixels_is_refused_by_its_head(tmp_path: Path) -> None:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 50000, 50000, 8, 2, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    shard = pack(tmp_path / "a.tar", [("bomb.png", bomb), ("bomb.cls", b"0")])
    (path,) = shard_images([shard])[str(shard)]
    with pytest.raises(UserError, match=r"a\.tar@512\+[0-9]+/bomb\.png cannot be read .*2500000000 pixels"):
        read_image(path)


def test_a_split_may_be_shards(tmp_path: Path) -> None:
    for split, files in (("train", GOOD), ("valid", GOOD[:6])):
        (tmp_path / split).mkdir()
        pack(tmp_path / split / "000000.tar", files[:2])
        pack(tmp_path / split / "000001.tar", files[2:])
    data = read_folder(tmp_path)
    assert data.classes == ["0", "1", "2"] and [label for _, label in data.train] == [0, 1, 2, 0]
    names = [member.name for path, _ in data.train if (member := parse_member(path))]
    assert names == ["000.png", "001.png", "002.png", "003.png"] and len(data.valid) == 3
    assert [label for _, label in read_folder(tmp_path, labels=False).train] == [-1] * 4
    for name in ("bar", "dot", "sky"):
        (tmp_path / "val" / name).mkdir(parents=True)
        (tmp_path / "val" / name / "0.png").write_bytes(picture())
    for path in (tmp_path / "valid").iterdir():
        path.unlink()
    (tmp_path / "valid").rmdir()
    data = read_folder(tmp_path)
    assert data.classes == ["bar", "dot", "sky"] and [label for _, label in data.train] == [0, 1, 2, 0]
    (tmp_path / "train" / "bar").mkdir()  # class folders: a tar file beside them is what they were unpacked from
    with pytest.raises(UserError, match=r"has classes that .*train lacks \(dot, sky\): remove"):
        read_folder(tmp_path)


def test_compressed_shards_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.tar.gz").write_bytes(b"")
    with pytest.raises(UserError, match=r"a\.tar\.gz is compressed, and images can be read only from plain shards"):
        find_paths([str(tmp_path / "a.tar.gz")], io.BytesIO())
