import os

import pytest

from baft_easyedit.bench.store import write_json
from baft_easyedit.files.writing import written_whole
from baft_easyedit.storage.lock import LOCK, DirectoryLock


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_new_files_have_the_mode_of_any_new_file(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write_json(tmp_path / "run/record.json", {})
        DirectoryLock(tmp_path).release()
    finally:
        os.umask(before)
    files = [tmp_path / "run/record.json", tmp_path / LOCK]
    assert [file.stat().st_mode & 0o777 for file in files] == [mode] * 2


def test_a_file_is_there_as_a_whole_or_not_at_all(tmp_path):
    file = tmp_path / "a/b"
    with written_whole(file) as stream:
        stream.write(b"first")

    def write_half():
        with written_whole(file) as stream:
            stream.write(b"half of the sec")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_half()
    assert file.read_bytes() == b"first"
    assert os.listdir(file.parent) == ["b"]
