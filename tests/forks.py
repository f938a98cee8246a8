"""Processes forked off one that has loaded what is heavy: a start of theirs costs a fraction of one of their own."""

import atexit
import contextlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

SERVER = """
import json, os, sys
exec(sys.argv[1])
def run(folder, code, arguments, said):
    os.chdir(folder)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
    os.dup2(1, 2)
    sys.argv[1:] = arguments
    exec(code, {"__name__": "__main__"})
for line in sys.stdin:
    children = []
    for job in json.loads(line):
        children.append(os.fork())
        if not children[-1]:
            run(*job)
            sys.exit(0)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]), flush=True)
"""


class Forks:
    """Runs Python code in forks of a process of its own, which starts at the first call and ends with this one."""

    def __init__(self, imports: str, **environment: str) -> None:
        self.imports, self.environment = imports, environment
        self.server: subprocess.Popen | None = None

    def run(self, folder: Path, code: str, *arguments: list[str]) -> list[subprocess.CompletedProcess]:
        """The code in a folder, once for each list of arguments and all at once; stdout holds stderr too."""
        if self.server is None:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "env": os.environ | self.environment}
            self.server = subprocess.Popen([sys.executable, "-c", SERVER, self.imports], text=True, **pipes)
            atexit.register(self.server.communicate)
        jobs = [(str(folder), code, words, f".said{number}.txt") for number, words in enumerate(arguments)]
        print(json.dumps(jobs), file=self.server.stdin, flush=True)
        codes = json.loads(self.server.stdout.readline())
        return [
            subprocess.CompletedProcess(words, status, (folder / said).read_text())
            for (*_, words, said), status in zip(jobs, codes, strict=True)
        ]


VERB_SERVER = """
import json, os, socket, sys
from nrcg.cli import main
from nrcg.cli.imports import import_step
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
for name in sys.argv[2:]:
    import_step(name, True)
listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
listener.bind(sys.argv[1])
listener.listen(64)
print("ready", flush=True)
waiting = 0
while True:
    asked, _ = listener.accept()
    while waiting and os.waitpid(-1, os.WNOHANG)[0]:
        waiting -= 1
    if os.fork():
        asked.close()
        waiting += 1
        continue
    message, files, *_ = socket.recv_fds(asked, 1 << 20, 3)
    job = os.fork()
    if not job:
        words, folder, environment = json.loads(message)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        for number, file in enumerate(files):
            os.dup2(file, number)
        sys.argv[1:] = words
        sys.exit(main())
    asked.send(str(os.waitstatus_to_exitcode(os.waitpid(job, 0)[1])).encode())
    os._exit(0)
"""
VERB = """\
import json, os, socket, sys
os.environ.pop("NRCG_WORKFLOW", None)
asks = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
asks.connect({place!r})
socket.send_fds(asks, [json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()], [0, 1, 2])
sys.exit(int(asks.recv(16)))
"""


@contextlib.contextmanager
def forked_verbs(steps: list[str]) -> Iterator[str]:
    """While it lasts, jobs of a Snakemake that this Python code starts are forks of one process, which has loaded some
    modules of nrcg.steps as verbs do. All else is a job's own: words, folder, environment, files, exit status."""
    with tempfile.TemporaryDirectory() as folder:
        place = str(Path(folder) / "socket")
        for name, text in (
            ("nrcg", f"#!{sys.executable} -SE\n{VERB.format(place=place)}"),
            ("python", f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n'),
        ):
            (Path(folder) / name).write_text(text)
            (Path(folder) / name).chmod(0o755)
        server = subprocess.Popen(
            [sys.executable, "-c", VERB_SERVER, place, *steps], stdout=subprocess.PIPE, start_new_session=True
        )
        try:
            assert server.stdout.readline() == b"ready\n"
            # The folder of Python is where jobs find nrcg first.
            yield f"import sys; sys.executable = {str(Path(folder) / 'python')!r}"
        finally:
            server.kill()
            server.communicate()
