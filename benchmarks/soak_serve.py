"""Very many tiny jobs, clients that cancel, delete and leave, workers that are killed: what is lost, what stays?

    python benchmarks/soak_serve.py BUNDLE --jobs 2000

At the end the server is started once more, as after any fault. It ends with 2 and says why if a job was lost or made
twice, a file was left or is missing, or the server's memory, file descriptors or threads have grown from the first
third of the jobs to the last. A trigger in the job store notes every completion.
"""

import asyncio
import json
import os
import platform
import tempfile
from collections import Counter
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import httpx2
import numpy as np
import typer
from command import run
from served import Served, serving

from stiv_deploy.runtime.errors import StivError

WAYS = {"wait": 0.5, "cancel": 0.15, "delete": 0.1, "sync": 0.1, "leave": 0.1, "listen": 0.05}
"""What clients do, by their share: ask and come back, cancel, delete, wait in one call, leave such a call, listen."""
CLIENTS = 16
GROWN_MIB, GROWN = 32.0, 4
"""More than this is growth: of memory (an allocator keeps some), of descriptors and threads."""
NOTED = """CREATE TABLE completions (id TEXT);
CREATE TRIGGER noted AFTER UPDATE OF state ON jobs WHEN NEW.state = 'completed' AND OLD.state <> 'completed'
BEGIN INSERT INTO completions VALUES (NEW.id); END"""


class Soak:
    """``jobs`` jobs at ``server``, during which ``kills`` workers are killed; everything is drawn from ``seed``."""

    def __init__(self, server: Served, jobs: int, kills: int, seed: int) -> None:
        self._server, self._jobs, self._kills = server, jobs, kills
        self._draw = np.random.default_rng(seed)
        self._numbers = iter(range(jobs))
        self.ids: dict[str, str] = {}
        self.usage: list[dict[str, float]] = []
        self.killed = 0

    async def run(self) -> None:
        """Ask for all of them, and wait until none is live."""
        async with httpx2.AsyncClient(base_url=self._server.address, timeout=300.0) as client:
            self._client = client
            await asyncio.gather(*(self._work() for _ in range(CLIENTS)))
        self._server.wait_until(
            lambda: not self._server.rows("SELECT 1 FROM jobs WHERE state IN ('queued', 'in_progress')")
        )

    async def _work(self) -> None:
        for number in self._numbers:
            if number * (self._kills + 1) // self._jobs > self.killed:
                self.killed += 1
                workers = self._server.workers()
                if workers:
                    workers[self._draw.integers(len(workers))].kill()
            if number >= 2 * CLIENTS and number % max(1, self._jobs // 40) == 0:
                self.usage.append(self._server.usage())
            way = str(self._draw.choice([*WAYS], p=[*WAYS.values()]))
            await getattr(self, f"_{way}")(self._body(number), float(self._draw.exponential(0.1)))

    def _body(self, number: int) -> dict[str, Any]:
        steps, mode = int(self._draw.integers(1, 9)), str(self._draw.choice(["none", "jit"]))
        return {"prompt": "digit", "seed": number, "num_inference_steps": steps, "guidance_mode": mode}

    async def _ask(self, body: dict[str, Any], way: str) -> str:
        answer = await self._client.post("/v1/videos", json=body)
        answer.raise_for_status()
        found = str(answer.json()["id"])
        self.ids[found] = way
        return found

    async def _wait(self, body: dict[str, Any], pause: float) -> None:
        job = await self._ask(body, "wait")
        while (await self._client.get(f"/v1/videos/{job}")).json()["status"] in ("queued", "in_progress"):
            await asyncio.sleep(0.1 + pause)

    async def _cancel(self, body: dict[str, Any], pause: float) -> None:
        job = await self._ask(body, "cancel")
        await asyncio.sleep(pause)
        (await self._client.post(f"/v1/videos/{job}/cancel")).raise_for_status()

    async def _delete(self, body: dict[str, Any], pause: float) -> None:
        job = await self._ask(body, "delete")
        await asyncio.sleep(pause)
        (await self._client.delete(f"/v1/videos/{job}")).raise_for_status()

    async def _sync(self, body: dict[str, Any], _pause: float) -> None:
        (await self._client.post("/v1/videos/sync", json=body)).raise_for_status()

    async def _leave(self, body: dict[str, Any], pause: float) -> None:
        with suppress(httpx2.TimeoutException):
            await self._client.post("/v1/videos/sync", json=body, timeout=0.01 + pause)

    async def _listen(self, body: dict[str, Any], pause: float) -> None:
        job = await self._ask(body, "listen")
        async with self._client.stream("GET", f"/v1/videos/{job}/events") as answer:
            await anext(answer.aiter_lines())
            await asyncio.sleep(pause)


def faults(server: Served, soak: Soak) -> list[str]:
    """What went wrong, in words."""
    states = {job: (state, code) for job, state, code in server.rows("SELECT id, state, error_code FROM jobs")}
    made = Counter(job for (job,) in server.rows("SELECT id FROM completions"))
    completed = {job for job, (state, _) in states.items() if state == "completed"}
    kept = {job: way for job, way in soak.ids.items() if way != "delete"}
    results, latents = ({file.name for file in (server.data / name).iterdir()} for name in ("results", "latents"))
    allowed = {"completed", "cancelled"}
    found = {
        "lost": [job for job in kept if job not in states],
        "made twice": [job for job, times in made.items() if times > 1],
        "failed": [job for job, (state, code) in states.items() if (code or state) not in allowed],
        "cancelled by nobody": [job for job, way in kept.items() if way in ("wait", "listen") and job not in completed],
        "deleted and still there": [job for job, way in soak.ids.items() if way == "delete" and job in states],
        "files without a job": [*(results - completed), *latents],
        "jobs without a file": [*(completed - results)],
    }
    words = [f"{what}: {len(jobs)}, for one {jobs[0]}" for what, jobs in found.items() if jobs]
    return words + growth(soak.usage)


def growth(usage: list[dict[str, float]]) -> list[str]:
    """What has grown from the first third of ``usage`` to the last."""
    third = max(1, len(usage) // 3)
    early, late = usage[:third], usage[-third:]
    words = []
    for name, most in (("server_mib", GROWN_MIB), ("descriptors", GROWN), ("threads", GROWN)):
        before, after = max(each[name] for each in early), min(each[name] for each in late)
        if after > before + most:
            words.append(f"{name} has grown from {before:.0f} to {after:.0f}")
    return words


def soaked(bundle: Path, jobs: int, kills: int, workers: int, seed: int) -> dict[str, Any]:
    """The result of a soak."""
    with tempfile.TemporaryDirectory() as folder:
        data, options = Path(folder) / "jobs", ("--workers", str(workers), "--latents-every", "2")
        with serving(bundle, data, options) as server:
            for statement in NOTED.split(";\n", 1):
                server.rows(statement)
            soak = Soak(server, jobs, kills, seed)
            asyncio.run(soak.run())
            taken_back = server.metrics()[("stiv_taken_back_total",)]
        with serving(bundle, data) as server:
            ends = server.rows("SELECT COALESCE(error_code, state), COUNT(*) FROM jobs GROUP BY 1")
            return {
                "jobs": jobs,
                "killed_workers": soak.killed,
                "ends": dict(ends),
                "taken_back": taken_back,
                "usage": {"first": soak.usage[0], "last": soak.usage[-1]},
                "faults": faults(server, soak),
            }


def main(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder.")],
    out: Annotated[Path | None, typer.Option(help="Write the result here as JSON.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Jobs in all.")] = 2_000,
    kills: Annotated[int, typer.Option(min=0, help="Workers that are killed, evenly spread over the jobs.")] = 20,
    workers: Annotated[int, typer.Option(min=1, help="Worker processes.")] = 2,
    seed: Annotated[int, typer.Option(min=0, help="Of everything that is drawn.")] = 0,
) -> None:
    """Soak a server in tiny jobs, print what came of it, and write it as JSON."""
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "command": f"python benchmarks/soak_serve.py BUNDLE --jobs {jobs} --kills {kills} --workers {workers}"
        f" --seed {seed}",
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        **soaked(bundle, jobs, kills, workers, seed),
    }
    typer.echo(json.dumps(result, indent=2))
    if out is not None:
        out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if result["faults"]:
        raise StivError("; ".join(result["faults"]))


if __name__ == "__main__":
    run(main)
