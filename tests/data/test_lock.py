import subprocess
import sys

import pytest

from raycap.data.lock import FileLock
from raycap.errors import RunError


def test_one_holder_at_a_time(tmp_path):
    one, two = FileLock(tmp_path / "deep" / "l"), FileLock(tmp_path / "deep" / "l")
    with one:
        assert one.held and one.try_acquire() and not two.try_acquire()
    assert not one.held and two.try_acquire()
    two.release()
    two.release()


def test_the_lock_of_a_dead_process_is_free(tmp_path):
    code = """
import sys
from raycap.data.lock import FileLock
FileLock(sys.argv[1]).acquire()  # kept alive by nothing: held until the handle closes with the process
print("held", flush=True)
sys.stdin.read()
"""
    command = [sys.executable, "-c", code, str(tmp_path / "l")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    assert not FileLock(tmp_path / "l").try_acquire()
    process.kill()
    process.wait()
    assert FileLock(tmp_path / "l").try_acquire()


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write"):
        FileLock(tmp_path / "file" / "l").try_acquire()
