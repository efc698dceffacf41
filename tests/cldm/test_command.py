"""What the scripts say about mistakes that the system reports."""

import pytest

from cldm.command import run_command
from cldm.files import write_whole


@pytest.mark.parametrize("place", ["file", "file/sub"])
def test_a_file_where_a_folder_is_needed_is_said_to_be_there(tmp_path, capsys, place):
    (tmp_path / "file").touch()
    assert run_command("tool", lambda: write_whole(tmp_path / place / "a.txt", b""), interrupted="") == 2
    assert capsys.readouterr().err == f"tool: {tmp_path / place}: there is a file where a folder is needed\n"
