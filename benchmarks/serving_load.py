"""A server at the edge of its capacity for minutes on end: what it answers, what it keeps, how it goes.

    python benchmarks/serving_load.py [--minutes 10] [--clients 32] [--plain] [--out FILE] [--json]

In an environment with vLLM (see `make test-vllm`). What `paving serve` starts, with a controller whose router reads as
benchmarks/protocols.py has it, eight places and too few cache blocks, so that requests wait and push each other out. Every
client asks again as soon as it is answered: prompts of many lengths, every policy, streamed or whole; every tenth goes away
in the middle, every twentieth asks for what no request may. Every two seconds: resident memory of the server's processes,
and how many requests the worker's controller knows of. At the end the clients stop, the server drains, and is told to go as
a service manager tells it. --plain: the same without a controller, to hold the memory against.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

PLACES, BLOCKS, LONGEST = 8, 28, 160  # requests at once; cache blocks of 32 tokens; tokens of a prompt and its answer
EVERY = 2.0  # seconds between two samples
HELD = "PAVING_LOAD_HELD"  # the file that the worker's own counts go to
POLICIES = (None, "default", "closed", "soft", "hard")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--plain", action="store_true", help="vLLM by itself")
    parser.add_argument("--out", type=Path, default=None, help="also write the JSON object to FILE")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--server", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.server:
        return serve(args.server)
    with tempfile.TemporaryDirectory() as folder:
        found = measured(Path(folder), args.minutes, args.clients, plain=args.plain)
    if args.out is not None:
        args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1) if args.json else as_text(found))
    return 0


# --- the server's side ---


def serve(arguments: Sequence[str]) -> int:
    """What `paving serve` starts, in this process."""
    from paving.serving.command import SERVER, server_command
    from paving.serving.environment import CONTROLLER

    folder, port, *extra = arguments
    command, environment = server_command(folder, model=None, host="127.0.0.1", port=int(port), extra=extra)
    if not os.environ.get(HELD):
        del environment[CONTROLLER]
        os.environ.pop(CONTROLLER, None)
    os.environ.update(environment)
    sys.argv = command[2:]  # behind python -m
    runpy.run_module(SERVER, run_name="__main__", alter_sys=False)
    return 0


def count_held() -> None:
    """Also where an engine process is spawned and this file is its main module: the worker writes down what it holds."""
    from paving.serving.served import Served

    made = Served.__init__

    def watched(self, *args, **kwargs):
        made(self, *args, **kwargs)

        def write() -> None:
            while True:
                with open(os.environ[HELD], "a", encoding="utf-8") as file:
                    file.write(f"{time.time():.1f} {len(self.requests)}\n")
                time.sleep(EVERY)

        threading.Thread(target=write, daemon=True).start()

    Served.__init__ = watched


if os.environ.get(HELD):
    count_held()


# --- the clients' side ---


def measured(folder: Path, minutes: float, clients: int, *, plain: bool) -> dict:
    import psutil

    port, held = made_ready(folder), folder / "held"
    line = [sys.executable, __file__, "--server", str(folder / "controller"), str(port), "--dtype", "bfloat16"]
    line += ["--max-model-len", "256", "--max-num-seqs", str(PLACES), "--num-gpu-blocks-override", str(BLOCKS)]
    line += ["--block-size", "32", "--served-model-name", "base"]
    env = (
        os.environ
        | ({} if plain else {HELD: str(held)})
        | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    )
    with (folder / "server.log").open("w+") as log:
        server = subprocess.Popen(line, env=env, stdout=log, stderr=log, start_new_session=True)
        try:
            wait_for(port, server, log)
            load = Load(port, clients, plain=plain)
            memory = watch(psutil.Process(server.pid), load, minutes)
            load.stop()
            drained = wait_until(lambda: metric(port, "vllm:num_requests_running") == 0, 60)
            time.sleep(2 * EVERY)
            metrics = {name: metric(port, name) for name in ("vllm:num_preemptions_total", "paving:gate_failures_total")}
            processes = psutil.Process(server.pid).children(recursive=True)
        except BaseException:
            os.killpg(server.pid, signal.SIGKILL)
            raise
        start = time.monotonic()
        server.terminate()
        try:
            code = server.wait(120)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            raise
        seconds = time.monotonic() - start
        left = [p.pid for p in psutil.wait_procs(processes, timeout=10)[1]]
        log.seek(0)
        errors = [x for x in log.read().splitlines() if "ERROR" in x and "paving" in x]
    counts = [0] if plain else [int(x.split()[1]) for x in held.read_text(encoding="utf-8").splitlines()]
    return {
        "controller": not plain, "minutes": minutes, "clients": clients, "places": PLACES, "blocks": BLOCKS,
        "answers": dict(load.counts), "n_wrong": len(load.wrong), "wrong": load.wrong[:5],
        "preemptions": metrics["vllm:num_preemptions_total"],
        "gate_failures": metrics["paving:gate_failures_total"], "n_errors": len(errors), "logged_errors": errors[:5],
        "held_most": max(counts), "held_at_the_end": counts[-1], "drained": drained, "memory": memory,
        "exit": {"code": code, "seconds": seconds, "processes_left": left},
    }  # fmt: skip


def made_ready(folder: Path) -> int:
    """A controller in folder/controller, and a free port."""
    from paired import lively_controller
    from paving.backbone import load_backbone
    from paving.controller import Hard, save_controller
    from protocols import LATE

    controller = lively_controller(load_backbone(dtype="bfloat16"), LATE).with_scale(1.0)
    save_controller(controller.with_policy(Hard(0.0)), folder / "controller")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Load:
    """Clients that ask until they are stopped. counts: how requests ended."""

    def __init__(self, port: int, clients: int, *, plain: bool):
        self.port, self.plain = port, plain
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._going = True
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._client, args=(i,), daemon=True) for i in range(clients)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._going = False
        for thread in self._threads:
            thread.join(300)
        if any(thread.is_alive() for thread in self._threads):
            raise RuntimeError("a client waits for an answer that does not come.")

    def _client(self, seed: int) -> None:
        rng = random.Random(seed)
        while self._going:
            ended, wrong = self._one(rng)
            with self._lock:
                self.counts[ended] += 1
                self.wrong += [wrong] if wrong else []

    def _one(self, rng: random.Random) -> tuple[str, str | None]:
        """(how it ended, what was wrong with it)"""
        leaves, refused = rng.random() < 0.1, rng.random() < 0.05 and not self.plain
        prompt = [rng.randrange(100, 40000) for _ in range(rng.randrange(4, 100))]
        tokens = rng.randrange(4, LONGEST - len(prompt))
        policy = "oracle" if refused else rng.choice(POLICIES)
        body = {"model": "base", "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "temperature": 0}
        body["stream"] = leaves or rng.random() < 0.5
        if policy is not None and not self.plain:
            body["vllm_xargs"] = {"paving_policy": policy}
        url = f"http://127.0.0.1:{self.port}/v1/completions"
        request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=300) as response:
                if leaves:
                    response.readline()
                    return "gone away", None
                text = response.read().decode()
        except urllib.error.HTTPError as error:
            error.read()
            if refused and error.code == 400:
                return "refused", None
            return f"HTTP {error.code}", f"{policy}: HTTP {error.code}"
        except OSError as error:
            return "lost", f"{policy}: {error}"
        if refused:
            return "answered", "a request for the oracle was answered"
        if self.plain:
            return "answered", None
        told = gate_of(text, body["stream"])
        if told is None or told["failed"] or (policy == "closed") != (told["policy"] == "closed"):
            return "answered", f"{policy}: the answer says {told}"
        return "answered", None


def gate_of(text: str, stream: bool) -> dict | None:
    if not stream:
        return json.loads(text).get("paving")
    parts = [json.loads(x[6:]) for x in text.split("\n\n") if x.startswith("data: {")]
    return next((part["paving"] for part in parts if "paving" in part), None)


def watch(process, load: Load, minutes: float) -> list[dict]:
    """A sample every EVERY seconds: time since the start, answers so far, resident MiB of the server's processes, the one
    that was started first."""
    samples, start = [], time.monotonic()
    while (now := time.monotonic() - start) < 60 * minutes:
        each = [p.memory_info().rss / 2**20 for p in (process, *process.children(recursive=True))]
        samples.append({"seconds": now, "answers": sum(load.counts.values()), "mib": sum(each), "each": each})
        time.sleep(EVERY)
        if len(samples) % 30 == 0:
            print(f"{now / 60:.1f} min: {dict(load.counts)}, {samples[-1]['mib']:.0f} MiB", file=sys.stderr, flush=True)
    return samples


def wait_for(port: int, server: subprocess.Popen, log) -> None:
    def up() -> bool:
        if server.poll() is not None:
            log.seek(0)
            raise RuntimeError(f"the server did not start:\n{log.read()[-3000:]}")
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
        except OSError:
            return False
        return True

    if not wait_until(up, 300):
        raise RuntimeError("the server did not start in time.")


def wait_until(true, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if true():
            return True
        time.sleep(0.5)
    return False


def metric(port: int, name: str) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as response:
        lines = response.read().decode().splitlines()
    return sum(float(x.rpartition(" ")[2]) for x in lines if x.partition("{")[0].partition(" ")[0] == name)


def as_text(found: dict) -> str:
    memory, leave = found["memory"], found["exit"]
    quarter = max(1, len(memory) // 4)
    means = [sum(s["mib"] for s in part) / len(part) for part in (memory[quarter : 2 * quarter], memory[-quarter:])]
    answers = ", ".join(f"{n} {ended}" for ended, n in sorted(found["answers"].items()))
    lines = [
        f"{'with' if found['controller'] else 'without'} a controller: {found['minutes']:g} minutes, "
        f"{found['clients']} clients on {found['places']} places, {found['blocks']} blocks",
        f"requests: {answers}; wrong: {found['n_wrong']}",
        f"preemptions {found['preemptions']:.0f}, gates that failed {found['gate_failures']:.0f}, "
        f"errors logged {found['n_errors']}",
        "resident memory each minute, MiB: " + ", ".join(f"{s['mib']:.0f}" for s in memory[:: round(60 / EVERY)]),
        f"resident memory, second quarter {means[0]:.0f} MiB, last quarter {means[1]:.0f} MiB "
        f"(least {min(s['mib'] for s in memory):.0f}, most {max(s['mib'] for s in memory):.0f})",
        f"requests that the controller knows of: {found['held_most']} at most, {found['held_at_the_end']} at the end",
        f"told to go: exit code {leave['code']} after {leave['seconds']:.1f} s, "
        f"{len(leave['processes_left'])} processes left",
    ]
    return "\n".join([*lines, *found["wrong"]])


if __name__ == "__main__":
    sys.exit(main())
