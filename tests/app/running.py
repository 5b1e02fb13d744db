"""A server of ours in a process of its own, with a folder for temporary files that can be looked at afterwards."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
START = 600  # seconds; the machine may be busy


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Running:
    """A server: `url`, `temp` (its folder for temporary files), `log()`, `process`."""

    def __init__(self, module, folder, *arguments, **environment):
        self.port, self.temp, self.log_file = free_port(), folder / "temp", folder / "log"
        self.url = f"http://127.0.0.1:{self.port}"
        self.temp.mkdir(exist_ok=True)
        self.arguments = [sys.executable, "-m", module, "--port", str(self.port), *map(str, arguments)]
        self.environment = {**os.environ, "TMPDIR": str(self.temp), "OMP_WAIT_POLICY": "PASSIVE", **environment}
        self.start()

    def start(self):
        with open(self.log_file, "ab") as log:
            self.process = subprocess.Popen(
                self.arguments, cwd=ROOT, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )
        end = time.monotonic() + START
        while time.monotonic() < end and self.process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return
            except urllib.error.HTTPError:  # it answers
                return
            except OSError:
                time.sleep(0.3)
        raise AssertionError(f"the server did not start: {self.log()[-3000:]}")

    def stop(self, with_signal=signal.SIGTERM):
        if self.process.poll() is None:
            self.process.send_signal(with_signal)
            self.process.wait(120)

    def log(self):
        return self.log_file.read_text("utf-8", errors="replace")

    def left_on_disk(self):
        """Files in the folder for temporary files, without those of libraries that hold nothing of a scan."""
        return [file for file in self.temp.rglob("*") if file.is_file() and "gradio" not in file.parts]

    def memory(self):
        """Resident bytes."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def running(module, folder, *arguments, **environment):
    server = Running(module, folder, *arguments, **environment)
    try:
        yield server
    finally:
        server.stop()
