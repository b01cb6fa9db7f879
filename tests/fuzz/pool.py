"""Cases in worker processes. A case that kills its process, or takes too long, has that as its outcome."""

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator

from fuzz.cases import Outcome, Settings

_SECONDS = 180  # that a case may take; a worker's first case waits for its imports too


class _Worker:
    """Runs one case at a time."""

    def __init__(self, settings: Settings, module: str) -> None:
        self._settings = settings
        self._module = module
        self._start()

    def _start(self) -> None:
        self._messages = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the process)
        self._process = subprocess.Popen(
            [sys.executable, "-m", self._module, str(self._settings.seed), ",".join(self._settings.backends)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._messages,
            text=True,
            bufsize=1,
            env={"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"} | os.environ,
            start_new_session=True,
        )

    def run(self, name: str) -> Outcome:
        messages_before = os.fstat(self._messages.fileno()).st_size
        timer = threading.Timer(_SECONDS, lambda: os.killpg(self._process.pid, signal.SIGKILL))
        timer.start()
        label = ""
        try:
            print(name, file=self._process.stdin, flush=True)
            while line := self._process.stdout.readline():
                what, *rest = json.loads(line)
                if what == "label":
                    (label,) = rest
                if what == "outcome":
                    return Outcome(*rest)
                if what == "died":
                    return Outcome("crashed", label, self._last_words(rest[0], messages_before))
        finally:
            timer.cancel()
        self.close()
        self._start()
        return Outcome("hung", label, f"more than {_SECONDS} s")

    def _last_words(self, status: int, start: int) -> str:
        """How a case ended: what a sanitizer found and where, or the last line that was printed, or the signal."""
        self._messages.seek(start)
        lines = self._messages.read().decode(errors="replace").splitlines()
        for line in lines:
            if "ERROR: AddressSanitizer" in line or "runtime error:" in line:
                where = next((x.strip() for x in lines if "csrc/" in x and " in " in x), "")
                return f"{line.strip()} {where}"
        last = next((line for line in reversed(lines) if line.strip()), "")
        return f"{signal.Signals(-status).name if status < 0 else f'exit status {status}'} {last}"

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._messages.close()


def run_all(
    names: Iterable[str], settings: Settings, num_workers: int, worker: str = "fuzz.worker"
) -> Iterator[tuple[str, Outcome]]:
    """(name, outcome) of each case, in the order in which they end. `worker` is the module that the processes run."""
    waiting: Iterator[str] = iter(names)
    take = threading.Lock()
    done: queue.Queue[tuple[str, Outcome] | None] = queue.Queue()

    def work() -> None:
        process = _Worker(settings, worker)
        while True:
            with take:
                name = next(waiting, None)
            if name is None:
                break
            done.put((name, process.run(name)))
        process.close()
        done.put(None)

    threads = [threading.Thread(target=work) for _ in range(num_workers)]
    for thread in threads:
        thread.start()
    ended = 0
    while ended < num_workers:
        result = done.get()
        if result is None:
            ended += 1
        else:
            yield result
    for thread in threads:
        thread.join()
