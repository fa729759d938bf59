"""What feeds our entries to timm's tests: which names they see, what leaves the archive."""

import io
import tarfile

import pytest
import timm_suite

from vitarium.backbones._registry import entries


def test_timms_tests_see_our_entries_and_no_others():
    suite = timm_suite.Suite([*entries()])
    assert suite.list_models(exclude_filters=["*nat*"], module=["swin_transformer"]) == [*entries()]
    assert suite.list_models(["nat_*"]) == []
    tags = suite.list_models(include_tags=True)
    assert {tag.partition(".")[0] for tag in tags} == {*entries()}
    assert "nat_mini.shi_in1k" in tags
    assert suite.list_models(pretrained=True) == ["nat_atto.vitarium_digits"]


def archive(folder, files):
    path = folder / "timm-1.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            if content is None:
                member.type, member.linkname = tarfile.SYMTYPE, "/etc"
            else:
                member.size = len(content)
            tar.addfile(member, io.BytesIO(content or b""))
    return path


def test_only_the_tests_leave_the_archive(tmp_path):
    files = {
        "timm-1/tests/test_models.py": b"1",
        "timm-1/tests/deep/x.py": b"2",
        "timm-1/tests/../../out.py": b"3",
        "timm-1/tests/link": None,
        "timm-1/timm/__init__.py": b"4",
        "/timm-1/tests/absolute.py": b"5",
    }
    folder = tmp_path / "a" / "b"
    tests = timm_suite.extract_tests(archive(tmp_path, files), folder)
    assert tests == folder / "tests"
    written = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()}
    assert written == {"timm-1.tar.gz", "a/b/tests/test_models.py", "a/b/tests/deep/x.py"}


def test_a_version_that_cannot_be_had_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setattr(timm_suite.timm, "__version__", "0.0.0")
    with pytest.raises(SystemExit, match=r"^timm_suite: timm 0\.0\.0 cannot be downloaded: .+$"):
        timm_suite.source_distribution()
    assert [*tmp_path.rglob("*.gz")] == []
