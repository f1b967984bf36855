"""Processes of the tests: what becomes of those that fail, hang, or are killed."""

import signal
import subprocess
import sys
import time

import psutil
import pytest

import modeling_anee

from .children import LIMIT, ROOT, Forks, run


STARTS_ANOTHER = """
import subprocess, sys, time
print("begun", flush=True)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
open(sys.argv[1], "w").write(str(child.pid))
time.sleep(600)
"""


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    """Without imports: they take seconds."""
    made = Forks(tmp_path_factory.mktemp("home"), imports="")
    yield made
    made.stop()


def gone(pid):
    for _ in range(100):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def test_a_program_that_hangs_is_ended_with_all_that_it_started_and_its_output_is_shown(tmp_path, capsys):
    with pytest.raises(subprocess.TimeoutExpired):
        run([sys.executable, "-c", STARTS_ANOTHER, tmp_path / "pid"], tmp_path, limit=3)
    assert "begun" in capsys.readouterr().out and gone(int((tmp_path / "pid").read_text()))


def test_a_child_that_hangs_is_ended_and_the_next_one_runs(forks, tmp_path, capsys):
    with pytest.raises(subprocess.TimeoutExpired):
        forks.run_together(STARTS_ANOTHER, tmp_path / "pid", each=[{}, {}], limit=3)
    assert capsys.readouterr().out.count("begun") == 2 and gone(int((tmp_path / "pid").read_text()))
    assert forks.run("print('again')") == (0, "again\n", "")


def test_a_child_is_a_program_of_its_own(forks, tmp_path):
    code = """
import os, sys
print(sys.argv, os.getcwd(), sys.stdin.read() == "", file=sys.stderr)
sys.exit(3)
"""
    done = forks.run(code, "x", 5, folder=tmp_path)
    assert done == (3, "", f"['-c', 'x', '5'] {tmp_path} True\n")
    assert "ZeroDivisionError" in forks.run("1 / 0").stderr
    assert forks.run("import os; os.kill(os.getpid(), 9)").returncode == -signal.SIGKILL


def test_a_child_has_our_package_only_if_asked_for(forks):
    code = "import importlib.util as u; spec = u.find_spec('modeling_anee'); print(spec and spec.origin)"
    assert forks.run(code).stdout.strip() == "None"
    assert forks.run(code, installed=True).stdout.strip() == modeling_anee.__file__


def test_where_one_of_several_fails_the_others_do_not_wait_for_it(forks):
    code = "import os, time; 1 / int(os.environ['RANK']); time.sleep(600)"
    done = forks.run_together(code, each=[{"RANK": "0"}, {"RANK": "1"}])
    assert [child.returncode for child in done] == [1, -signal.SIGKILL]


HANGS = """
import subprocess, sys, threading
def test_waits_for_nobody(): threading.Event().wait()
def test_waits_for_a_process(): subprocess.run([sys.executable, "-c", "import time; time.sleep(600)"], capture_output=True)
def test_passes(): pass
"""


@pytest.mark.slow
def test_a_suite_with_tests_that_hang_ends(tmp_path):
    (tmp_path / "test_hangs.py").write_text(HANGS)
    settings = ["-c", ROOT / "pyproject.toml", "--rootdir", tmp_path, "-p", "no:cacheprovider", "-n", "1"]
    done = run([sys.executable, "-m", "pytest", *settings, "-o", "timeout=1", tmp_path], tmp_path, limit=120)
    assert done.returncode == 1 and "2 failed, 1 passed" in done.stdout, done.stdout + done.stderr


def test_children_are_ended_before_the_test_that_waits_for_them(request):
    assert LIMIT < float(request.config.getini("timeout")) < float(request.config.getini("faulthandler_timeout"))
