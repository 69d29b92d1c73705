"""What stands in the place of a file that is to be written."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from classification.errors import UserError
from classification.system.new_files import check_new, move


def test_a_pipe_is_no_file_and_is_left_alone(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    check_new(pipe, force=True)  # as /dev/stdout, which is written to
    with pytest.raises(UserError, match=r"--output .*pipe is a device or a pipe: give a file"):
        check_new(pipe, force=True, device=False)
    (tmp_path / "new").touch()
    with pytest.raises(FileExistsError, match="it is no file"):
        move(tmp_path / "new", pipe)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
