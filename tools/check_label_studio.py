r"""A project of mathv2-records in a real Label Studio: imported, annotated by its API, read back.

    python tools/check_label_studio.py [--env=.venv-label-studio] [--screenshot=FILE.png]

Label Studio (SQLite, 127.0.0.1) is installed into an environment of its own, which is kept, and
serves from a temporary folder. Two users answer every task; what comes back must be what they said.
A screenshot of the page that people see needs a Chromium: --browser=PATH.
"""

import argparse
import contextlib
import json
import os
import pathlib
import random
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

from mathv2_jax import records
from mathv2_jax.cli import records as command
from mathv2_jax.data import annotation, ratings
from mathv2_jax.data import store as store_lib
from mathv2_jax.text import parse

VERSIONS = ["label-studio==1.23.2", "playwright==1.65.2"]
USERS = [("ada@example.org", "a" * 40), ("emmy@example.org", "b" * 40)]
PASSWORD = "only-on-127-0-0-1"
WAIT_SECONDS = 300


def install(env: pathlib.Path) -> pathlib.Path:
    """The environment's folder of programs."""
    if not (env / "bin" / "label-studio").exists():
        print(f"installing {' and '.join(VERSIONS)} into {env}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", os.fspath(env)], check=True)
        pip = env / "bin" / "pip"
        subprocess.run([pip, "install", "-q", "uv"], check=True)
        python = os.fspath(env / "bin" / "python")
        subprocess.run(
            [env / "bin" / "uv", "pip", "install", "-q", "--python", python, *VERSIONS], check=True
        )
    return env / "bin"


def settings(data: pathlib.Path) -> dict[str, str]:
    return {
        **os.environ,
        "LABEL_STUDIO_BASE_DATA_DIR": os.fspath(data),
        "LABEL_STUDIO_ENABLE_LEGACY_API_TOKEN": "true",
        "COLLECT_ANALYTICS": "false",
        "DJANGO_DB": "sqlite",
    }


@contextlib.contextmanager
def serving(programs: pathlib.Path, data: pathlib.Path, port: int) -> Iterator[str]:
    """The address of a server that answers."""
    (data / "log.txt").parent.mkdir(parents=True, exist_ok=True)
    user, token = USERS[0]
    flags = ["--no-browser", "--port", str(port), "--username", user, "--password", PASSWORD]
    with (data / "log.txt").open("w") as log:
        process = subprocess.Popen(
            [programs / "label-studio", "start", *flags, "--user-token", token],
            env=settings(data),
            stdout=log,
            stderr=log,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        began = time.monotonic()
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
                break
            if process.poll() is not None or time.monotonic() - began > WAIT_SECONDS:
                raise SystemExit(f"it did not start:\n{(data / 'log.txt').read_text()[-4000:]}")
            time.sleep(1)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def call(url: str, token: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    headers = {"Authorization": f"Token {token}", "Content-Type": "application/json"}
    request = urllib.request.Request(url, data, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read() or b"null")
    except urllib.error.HTTPError as error:
        raise SystemExit(f"{url}: {error.code} {error.read()[:2000]!r}") from error


def second_user(programs: pathlib.Path, data: pathlib.Path) -> None:
    """Made in the database: its API makes users by invitation only."""
    email, token = USERS[1]
    code = (
        "from users.models import User; from organizations.models import Organization;"
        "from rest_framework.authtoken.models import Token;"
        f"u = User.objects.create_user(email={email!r}, password={PASSWORD!r});"
        "o = Organization.objects.first(); o.add_user(u); u.active_organization = o; u.save();"
        f"Token.objects.filter(user=u).delete(); Token.objects.create(user=u, key={token!r})"
    )
    subprocess.run(
        [programs / "label-studio", "shell"],
        input=code.encode(),
        env=settings(data),
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def made_records(folder: pathlib.Path) -> None:
    """Proofs that wait for people, with an analysis or two each."""
    rows = []
    for n in range(6):
        statement = rf"Show that $\sum_{{k=1}}^n k = \frac{{n(n+1)}}{{2}}$ & $n > {n}$."
        proof = rf"Clear: \[ \frac{{n(n+1)}}{{2}} + (n+1) = \frac{{(n+1)(n+2)}}{{2}} \] <b>{n}</b>"
        rows.append(dict(id=f"p{n}", problem=statement, proof=proof))
        for score in (0.0, 1.0)[: n % 3]:
            text = parse.write_analysis(f"Step {n} with $x_{n}^2$ holds.", score)
            rows.append(dict(id=f"a{n}{score}", problem=statement, proof=proof, analysis=text))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _records(folder, f"--from={folder / 'rows.jsonl'}")


def _records(folder: pathlib.Path, *flags: str) -> None:
    code = command.main(["mathv2-records", f"--records={folder / 'records'}", *flags])
    assert code == 0, flags


def answer(url: str, task: dict[str, Any], token: str, draw: random.Random) -> ratings.Rating:
    """A random answer to a task by a user, through the API."""
    choice = lambda: draw.choice(["0", "0.5", "1"])  # noqa: E731
    data, score = task["data"], choice()
    said = [("score", "proof", "choices", {"choices": [score]})]
    qualities = {}
    for n in range(1, annotation.ANALYSES + 1):
        if data.get(f"analysis_{n}_id"):
            value = choice()
            qualities[data[f"analysis_{n}_id"]] = float(value)
            said.append((f"quality_{n}", f"analysis_{n}", "choices", {"choices": [value]}))
    said.append(("comment", "proof", "textarea", {"text": ["Looked at it."]}))
    result = [
        {"from_name": name, "to_name": to, "type": kind, "value": value}
        for name, to, kind, value in said
    ]
    call(f"{url}/api/tasks/{task['id']}/annotations", token, {"result": result})
    return ratings.Rating(
        rater="", proof_id=data["proof_id"], score=float(score), qualities=qualities, place=0
    )


def check(url: str, folder: pathlib.Path) -> tuple[int, int]:
    """Imports, annotates, exports and reads back; the project's number, and that of a task."""
    token = USERS[0][1]
    project = folder / "project"
    _records(folder, f"--annotate={project}")
    page = (project / annotation.CONFIG).read_text()
    made = call(f"{url}/api/projects", token, {"title": "Proofs", "label_config": page})
    number = made["id"]
    tasks = json.loads((project / annotation.TASKS).read_text())
    call(f"{url}/api/projects/{number}/import", token, tasks)
    served = call(f"{url}/api/tasks?project={number}&page_size=100&fields=all", token)["tasks"]
    assert [t["data"] for t in sorted(served, key=lambda t: t["id"])] == [t["data"] for t in tasks]
    draw, said = random.Random(0), []
    for user in USERS:
        said.append([answer(url, task, user[1], draw) for task in served])
    exported = call(f"{url}/api/projects/{number}/export?exportType=JSON", token)
    (folder / "export.json").write_text(json.dumps(exported))
    given = ratings.read(store_lib.epath.Path(folder / "export.json"))
    raters = sorted({rating.rater for rating in given})
    assert len(raters) == len(USERS) and len(given) == len(USERS) * len(tasks), raters
    heard = sorted((r.proof_id, r.score, sorted(r.qualities.items())) for r in given)
    spoken = [r for each in said for r in each]
    assert heard == sorted((r.proof_id, r.score, sorted(r.qualities.items())) for r in spoken)
    flags = (f"--annotations={folder / 'export.json'}", f"--adjudicate={raters[0]}")
    _records(folder, *flags)
    found = {r.id: r for r in store_lib.Store(folder / "records").latest()}
    for rating in said[0]:  # the last word is the first user's
        proof = found[rating.proof_id]
        assert isinstance(proof, records.Proof) and proof.label is not None
        assert proof.label.score == rating.score and "Looked at it." in proof.label.comment
        for name, value in rating.qualities.items():
            assert found[name].label.score == value
    print(f"{len(tasks)} tasks, {len(given)} annotations by {len(raters)} users came back as said")
    return number, max(task["id"] for task in served if task["data"]["analysis_2_id"])


_SHOT = """
import sys
from playwright.sync_api import sync_playwright

url, number, task, browser, path, user, password = sys.argv[1:]
with sync_playwright() as p:
    page = p.chromium.launch(executable_path=browser, args=["--no-sandbox"]).new_page(
        viewport={"width": 1500, "height": 1100})
    page.goto(f"{url}/user/login")
    page.fill("input[name=email]", user)
    page.fill("input[name=password]", password)
    page.click("button[type=submit]")
    page.wait_for_url(lambda now: "login" not in now, timeout=120000)
    page.goto(f"{url}/projects/{number}/data?task={task}")
    page.wait_for_selector(".lsf-main-view, .lsf-editor, [class*=main-view]", timeout=60000)
    page.wait_for_timeout(8000)
    page.screenshot(path=path)
    print(page.locator("math").count(), "formulas on the page")
"""


def screenshot(
    programs: pathlib.Path, url: str, at: tuple[int, int], browser: str, path: pathlib.Path
) -> None:
    """A task's page, by a headless Chromium that logs in; `at` is the project and the task."""
    where = [url, *map(str, at), browser, os.fspath(path), USERS[0][0], PASSWORD]
    subprocess.run([programs / "python", "-c", _SHOT, *where], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--env", type=pathlib.Path, default=pathlib.Path(".venv-label-studio"))
    parser.add_argument("--screenshot", type=pathlib.Path)
    parser.add_argument("--browser", default="/usr/bin/chromium")
    args = parser.parse_args()
    programs = install(args.env.absolute())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as at:
        folder = pathlib.Path(at)
        made_records(folder)
        with serving(programs, folder / "server", port) as url:
            second_user(programs, folder / "server")
            at_task = check(url, folder)
            if args.screenshot:
                screenshot(programs, url, at_task, args.browser, args.screenshot)


if __name__ == "__main__":
    main()
