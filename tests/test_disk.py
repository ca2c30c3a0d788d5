"""Reading takes what is there, and no more than it may."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from qdeploy.disk.files import read_bounded
from qdeploy.errors import InputError


def test_a_file_is_read_up_to_the_limit_and_not_beyond(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_bounded(path, 5, what="model") == b"12345"
    with pytest.raises(InputError, match="larger than 4 bytes"):
        read_bounded(path, 4, what="model")


def test_a_file_that_grows_while_it_is_read_is_refused():
    with pytest.raises(InputError, match="grew while it was read"):
        read_bounded(Path("/proc/self/status"), 1 << 20, what="model")  # says that it has 0 bytes


@pytest.mark.parametrize(
    ("size", "says"), [(5, "5 bytes read"), (1 << 40, "model file: does not fit into memory")]
)
def test_memory_is_taken_for_the_file_and_not_for_the_limit(tmp_path, size, says):
    with (tmp_path / "file").open("wb") as file:
        file.truncate(size)
    script = """
        import resource
        from pathlib import Path
        from qdeploy.disk.files import read_bounded
        from qdeploy.errors import InputError
        resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
        try:
            print(len(read_bounded(Path("file"), 1 << 42, what="model")), "bytes read")
        except InputError as error:
            print(error)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert says in done.stdout
