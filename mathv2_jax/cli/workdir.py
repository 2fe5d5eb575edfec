"""What a workdir says about its run: how it was begun, how far it is, and how it may go on."""

import difflib
import functools
import hashlib
import importlib.metadata
import json
import pathlib
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from etils import epath

import mathv2_jax
from mathv2_jax import metrics, storage
from mathv2_jax.cli import config as config_lib
from mathv2_jax.cli import inputs, shell
from mathv2_jax.data import sources, table
from mathv2_jax.stages import autolabel, experts, rejection
from mathv2_jax.text import tokenizer as tokenizer_lib

INPUT = "records/input"


def begin(workdir: epath.Path, config: config_lib.RunConfig) -> None:
    """Write input files and config of a new run, or check that this one may go on.

    ValueError where the workdir holds another run, or stages of one without its config.
    """
    if storage.exists(workdir / "config.json"):
        asked = config_lib.identity(config)
        saved = begun_as(workdir, asked)
        names = [stage["name"] for stage in saved["stages"]]
        done = [name for name in names if is_done(workdir, name)]
        _forget_refused_probes(workdir, saved, done)
        begun = [name for name in names if has_begun(workdir, name)]
        config_lib.require_same(saved, asked, done, begun)
        _require_input(workdir)
        return
    left = [n for n in storage.list_names(workdir / "records") if n != "input"]
    if left:
        raise ValueError(
            f"{workdir / 'config.json'} is missing, though {workdir / 'records' / left[0]} is "
            "there: restore that file, or take another workdir"
        )
    began = time.monotonic()
    # What an interrupted start left may be of other settings, the tokenizer above all.
    storage.remove_folder(workdir / INPUT)
    if config.tokenizer.directory:
        given = shell.absolute(config.tokenizer.directory)
        inputs.copy_tokenizer(workdir, given, config.model.vocab_size)
    templates = config.roles.templates
    if config.world is None:
        real = config.real or inputs.RealConfig()
        folder = shell.absolute(config.data)
        make_tokenizer = functools.partial(run_tokenizer, workdir, config)
        counts = inputs.write_real(workdir, folder, real, templates, make_tokenizer)
    else:
        counts = inputs.write_world(workdir, config.world, config.seed, templates)
    shown = "  ".join(f"{name} {count}" for name, count in counts.items())
    print(f"input: {shown}", flush=True)
    metrics.write_timing(workdir, "input", {"seconds": time.monotonic() - began})
    names = storage.list_names(workdir / INPUT, "*.*")
    kept = [name for name in names if not name.endswith(table.INDEX)]  # which can be made anew
    write_config(workdir, config, _digests(workdir, kept))


def write_config(
    workdir: epath.Path, config: config_lib.RunConfig, digests: Mapping[str, str] | None = None
) -> None:
    """Put config and code of the session that begins into config.json; print what changed.

    `changes` there says what each session that changed anything did. `digests` are those of a new
    run's input files.
    """
    body: dict[str, Any] = {
        "schema": config_lib.SCHEMA,
        "identity": config_lib.identity(config),
        "runtime": config_lib.runtime(config),
        "commit": code_commit(),
        "input": digests or {},
        "changes": [],
    }
    path = workdir / "config.json"
    if storage.exists(path):
        saved = read_config(workdir)
        body |= {name: saved[name] for name in ("input", "changes") if name in saved}
        changed = [
            f"{where}: it was {old}, now {new}"
            for name in ("identity", "runtime", "commit")
            for where, old, new in config_lib.differences(
                _by_stage(saved.get(name)), _by_stage(body[name]), name
            )
        ]
        for change in changed:
            print(f"goes on with another {change}", flush=True)
        body["changes"] += [changed] if changed else []
    storage.write_whole(path, (json.dumps(body, indent=1, sort_keys=True) + "\n").encode())


def _by_stage(body: Any) -> Any:
    """An identity with its list of stages by name, so that differences name the stage."""
    if not isinstance(body, Mapping) or "stages" not in body:
        return body
    return {**body, "stages": {stage["name"]: stage for stage in body["stages"]}}


def _digests(workdir: epath.Path, names: Iterable[str]) -> dict[str, str]:
    """The sha256 of input files; an empty one where there is no such file."""
    paths = {name: workdir / INPUT / name for name in names}
    return {
        name: hashlib.sha256(storage.read_bytes(path)).hexdigest() if storage.exists(path) else ""
        for name, path in paths.items()
    }


def _require_input(workdir: epath.Path) -> None:
    """ValueError names an input file that is not what the run began with."""
    wanted = read_config(workdir).get("input", {})
    found = _digests(workdir, wanted)
    for name, digest in wanted.items():
        if found[name] != digest:
            state = "differs from what the run began with" if found[name] else "is missing"
            raise ValueError(
                f"{workdir / INPUT / name} {state} (config.json has its sha256, {digest[:16]}...): "
                "restore the file, or take another workdir"
            )


def read_config(workdir: epath.Path) -> dict[str, Any]:
    """What config.json holds; ValueError where it is damaged or of another schema."""
    path = workdir / "config.json"
    way_out = "restore it, or take another workdir"
    body = sources.read_object(path, ("schema", "identity", "runtime"), way_out)
    if body["schema"] != config_lib.SCHEMA:
        raise ValueError(
            f"{path} has schema {body['schema']!r}, this program reads {config_lib.SCHEMA}: use "
            "the program that wrote it"
        )
    return body


def begun_as(workdir: epath.Path, asked: Mapping[str, Any]) -> dict[str, Any]:
    """The identity in config.json. Where it says nothing of templates, they are those `asked`."""
    return {"templates": asked["templates"], **read_config(workdir)["identity"]}


def finished(workdir: epath.Path, config: config_lib.RunConfig) -> dict[str, Any] | None:
    """The summary of a run whose stages are those of `config`, None where it is not finished.

    Its table may compare others than `config` asks for.
    """
    if not storage.exists(workdir / "summary.json"):
        return None
    summary = read_summary(workdir)
    asked = [s.name for s in config.stages]
    same = set(summary["stages"]) == set(asked) and all(is_done(workdir, n) for n in asked)
    return summary if same else None


def read_summary(workdir: epath.Path) -> dict[str, Any]:
    """What summary.json holds; ValueError where it is damaged."""
    way_out = "delete it, and the run's command writes it anew from the records"
    return sources.read_object(workdir / "summary.json", ("metrics", "stages"), way_out)


def is_done(workdir: epath.Path, stage: str) -> bool:
    """Whether the stage has finished."""
    return storage.exists(workdir / "records" / stage / "stage.json")


def has_begun(workdir: epath.Path, stage: str) -> bool:
    """Whether anything that the stage wrote counts: a checkpoint, a part of its records."""
    saved = storage.list_names(workdir / "checkpoints" / stage / "steps", "[0-9]*")
    steps = [name for name in saved if name.isdecimal()]
    return (
        bool(steps)
        or bool(storage.Parts(workdir / "records" / stage).names())
        or is_done(workdir, stage)
    )


def _forget_refused_probes(workdir: epath.Path, saved: Any, done: Sequence[str]) -> None:
    """A probe that has not passed keeps nothing, so that its settings may change."""
    for stage in saved["stages"]:
        if stage["kind"] == "probe" and stage["name"] not in done:
            storage.remove_folder(workdir / "records" / stage["name"])


def restart(workdir: epath.Path, stage: str) -> None:
    """Delete what a stage and those after it wrote; they then run anew, with any settings.

    ValueError where the run has no such stage.
    """
    if not storage.exists(workdir / "config.json"):
        raise ValueError(f"--restart_stage={stage}: {workdir} holds no run yet; leave the flag out")
    names = [s["name"] for s in read_config(workdir)["identity"]["stages"]]
    if stage not in names:
        near = difflib.get_close_matches(stage, names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f", which has {names}"
        raise ValueError(f"--restart_stage={stage} is no stage of the run in {workdir}{hint}")
    gone = names[names.index(stage) :]
    storage.remove(workdir / "summary.json")
    for name in reversed(gone):  # killed at any moment, what is left is a run that goes on
        storage.remove(workdir / "records" / name / "stage.json")
        for folder in ("checkpoints", "records", "metrics", "tensorboard"):
            storage.remove_folder(workdir / folder / name)
        for beside in (autolabel.UNDECIDED, experts.WANTED, rejection.CHOSEN):
            storage.remove_folder(workdir / "records" / f"{name}{beside}")
    lines = workdir / "metrics.jsonl"
    if storage.exists(lines):
        rows = storage.read_bytes(lines).decode().splitlines()
        stages = metrics.stages_of(rows, lines)
        kept = [row for row, name in zip(rows, stages, strict=True) if name not in gone]
        storage.write_whole(lines, "".join(f"{row}\n" for row in kept).encode())
    print(f"restarting at {stage}: dropped what {', '.join(gone)} wrote", flush=True)


def run_tokenizer(workdir: epath.Path, config: config_lib.RunConfig) -> tokenizer_lib.Tokenizer:
    """The run's tokenizer: its copy of the one given, or trained on its input the first time."""
    settings = config.tokenizer
    if settings.directory:
        return inputs.read_tokenizer(workdir)
    return inputs.make_tokenizer(
        workdir, settings.vocab_size, settings.whole_phrases, settings.max_texts
    )


def code_commit() -> str:
    """The commit of the code that runs, `-dirty` where a tracked file differs, or `unknown`.

    Asked of git in a checkout, else of what pip noted down when it installed from one.
    """
    root = pathlib.Path(mathv2_jax.__file__).resolve().parents[1]
    if (root / ".git").exists():
        words = ("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
        try:
            told = subprocess.run(
                ["git", "--no-optional-locks", "-C", str(root), *words],
                capture_output=True,
                text=True,
                timeout=30,
            )
        except (OSError, subprocess.TimeoutExpired):
            return "unknown"
        return told.stdout.strip() if told.returncode == 0 else "unknown"
    try:
        noted = importlib.metadata.distribution("mathv2_jax").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
    return json.loads(noted or "{}").get("vcs_info", {}).get("commit_id", "unknown")
