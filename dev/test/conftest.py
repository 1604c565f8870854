"""pytest's hooks and fixtures; `make test` ends with the line that is printed here."""
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import finetune  # noqa: E402, F401: this folder's, before a file of tests puts dev/bench, which has one too, in front
from helpers import ROOT, Lab, execute  # noqa: E402

# A job in the background may be started with Ctrl-C and hang-ups ignored, and whom it starts inherits that: the programs under test too.
for number, action in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, action)

@pytest.fixture
def lab(tmp_path):
    """A folder of its own, in which the trainer runs."""
    return Lab(tmp_path)

@pytest.fixture(scope="module")
def shared_lab(tmp_path_factory):
    """One for a whole file of tests, for those that only compare logs."""
    return Lab(tmp_path_factory.mktemp("lab"))

@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    """Who is not root mounts disks in a namespace of their own: such a test runs there, in a pytest of its own."""
    if "disk" not in pyfuncitem.fixturenames or os.geteuid() == 0:
        return None
    if subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True).returncode != 0:
        pytest.skip("a disk cannot be mounted, neither as root nor in a user namespace")
    test = f"{pyfuncitem.path}::{pyfuncitem.nodeid.split('::', 1)[1]}"
    with tempfile.TemporaryDirectory() as folder:
        done = execute("unshare", "-rm", sys.executable, "-B", "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--basetemp={folder}/x", test,
                       cwd=ROOT, timeout=300)
    assert done.status == 0 and "1 passed" in done.out, done.out + done.err
    return True

def pytest_unconfigure(config):
    """The last lines: each reason to skip with the tests that it skips, then how many passed, failed and were skipped."""
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    if terminal is None or hasattr(config, "workerinput") or config.option.collectonly:
        return
    skipped = {}
    for report in terminal.stats.get("skipped", []):
        reason = report.longrepr[2].removeprefix("Skipped: ") if isinstance(report.longrepr, tuple) else str(report.longrepr)
        tests = skipped.setdefault(reason, {})
        test = report.nodeid.split("[")[0]
        tests[test] = tests.get(test, 0) + 1
    for reason, tests in sorted(skipped.items()):
        print(f"skipped {sum(tests.values())}: {reason}")
        for test, n in sorted(tests.items()):
            print(f"    {test}{f' ({n} cases)' if n > 1 else ''}")
    count = {kind: len(terminal.stats.get(kind, [])) for kind in ("passed", "xpassed", "failed", "error", "skipped", "xfailed")}
    print(f"{count['passed']} passed, {count['failed'] + count['error'] + count['xpassed']} failed, "
          f"{count['skipped'] + count['xfailed']} skipped", flush=True)
