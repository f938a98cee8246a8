"""Processes forked off one that has loaded what is heavy: a start of theirs costs a fraction of one of their own."""

import atexit
import json
import os
import subprocess
import sys
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
