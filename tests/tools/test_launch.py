"""The launch scripts: what they print, and what they do to workers that a false gcloud plays.

It runs a line that is meant for a worker in a shell whose home is that worker's folder.
"""

import os
import pathlib
import subprocess
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
GCLOUD = r"""#!/usr/bin/env bash
echo "$*" | head -n 1 >>"$FAKE/calls"
worker=all line=""
for argument in "$@"; do
  case "$argument" in
    --worker=*) worker="${argument#*=}" ;;
    --command=*) line="${argument#*=}" ;;
  esac
done
case "$3/$4" in
  queued-resources/describe)
    [ -e "$FAKE/asked" ] || exit 1
    echo x >>"$FAKE/asked"
    [ "$(wc -l <"$FAKE/asked")" -gt 2 ] && echo ACTIVE || echo PROVISIONING
    ;;
  queued-resources/create) echo x >"$FAKE/asked" ;;
  tpu-vm/ssh)
    failed=0
    for home in "$FAKE/$5"-*; do
      [ "$worker" = all ] || [ "$home" = "$FAKE/$5-$worker" ] || continue
      HOME="$home" bash -c "cd; $line" || failed=$?
    done
    exit "$failed"
    ;;
esac
"""
CALL = ["--name=pod", "--zone=z"]


@pytest.fixture
def workers(tmp_path):
    """Two workers of one slice, with a checkout that is installed."""
    script = tmp_path / "bin" / "gcloud"
    script.parent.mkdir()
    script.write_text(GCLOUD)
    script.chmod(0o755)
    homes = [tmp_path / f"pod-{index}" for index in range(2)]
    for home in homes:
        (home / "mathv2_jax" / ".venv" / "bin").mkdir(parents=True)
        compile_flags = home / "mathv2_jax" / ".venv" / "bin" / "mathv2-compile"
        compile_flags.write_text('#!/bin/sh\necho "--for=$1 $2"\n')
        compile_flags.chmod(0o755)
    return homes


def launch(*arguments, script="launch_tpu.sh", cwd=ROOT, **settings):
    folder = settings.pop("fake", None)
    environment = dict(os.environ, MATHV2_QUEUE_SECONDS="0", **settings)
    if folder is not None:
        environment |= {"FAKE": str(folder), "PATH": f"{folder}/bin:{os.environ['PATH']}"}
    command = ["bash", f"tools/{script}", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def read_back(line):
    """The words that a shell makes of a line."""
    program = 'eval "words=($1)"; printf "%s\\0" "${words[@]}"'
    done = subprocess.run(["bash", "-c", program, "_", line], capture_output=True, check=True)
    return done.stdout.decode().split("\0")[:-1]


def test_a_dry_run_prints_commands_that_a_shell_reads_back():
    train = ["mathv2-train", "--config=configs/a.py", "--workdir=gs://b/a run"]
    options = ["--type=v6e-16", "--queue", "--slices=2", "--spot", "--dry_run", "--project=p"]
    done = launch(*CALL, *options, "--", *train)
    assert done.returncode == 0, done.stderr
    calls = [read_back(line) for line in done.stdout.splitlines()]
    assert calls[0] == [
        *("gcloud", "compute", "tpus", "queued-resources", "create", "pod", "--zone=z"),
        *("--project=p", "--accelerator-type=v6e-16", "--runtime-version=v2-alpha-tpuv6e"),
        *("--spot", "--node-count=2", "--node-prefix=pod"),
    ]
    verbs = [" ".join(call[:5]) for call in calls]
    ssh, scp = ("gcloud compute tpus tpu-vm " + verb for verb in ("ssh", "scp"))
    described = "gcloud compute tpus queued-resources describe"
    assert verbs[1:4] == [described, ssh, ssh] and verbs[4].startswith("git -C")
    assert verbs[5:] == [scp, scp, ssh, ssh, ssh, ssh, ssh]
    assert [call[5] for call in calls[7:]] == ["pod-0", "pod-1", "pod-0", "pod-1", "pod-0"]
    assert "--coordinator=auto" in done.stdout and "--topology=v6e-16 --xla_flags" in done.stdout


def test_all_workers_run_the_command_and_the_first_is_followed(workers, tmp_path):
    line = 'echo "$(basename $HOME) says $LIBTPU_INIT_ARGS"; echo "arg: $0"; sleep 1'
    options = ["--type=v5p-16", "--queue", "--no_install"]
    done = launch(*CALL, *options, "--", "bash", "-c", line, "a b", fake=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "pod-0 says --for=--topology=v5p-16 --xla_flags",
        "arg: a b",
    ]
    assert "pod-1 says" in (workers[1] / "mathv2_jax" / "run.log").read_text()
    assert (tmp_path / "asked").read_text().count("x") == 3  # it waited


def test_a_failure_is_started_again_and_neither_bad_input_nor_what_was_stopped(workers, tmp_path):
    counted = "echo run >>../count; "
    again = launch(
        *(*CALL, "--no_install", "--restarts=2", "--", "bash", "-c", counted + "exit 1"),
        fake=tmp_path,
    )
    assert again.returncode == 1
    assert [(home / "count").read_text().count("run") for home in workers] == [3, 3]
    assert again.stderr.count("starting again") == 2
    for runs, code in ((4, 2), (5, 75)):
        program = ["bash", "-c", f"{counted}exit {code}"]
        done = launch(*CALL, "--no_install", "--restarts=2", "--", *program, fake=tmp_path)
        assert done.returncode == code
        assert (workers[0] / "count").read_text().count("run") == runs


def test_a_broken_connection_is_made_again_and_ends_no_run(workers, tmp_path):
    gcloud = tmp_path / "bin" / "gcloud"
    broken = '[[ "$*" != *tail* || -e "$FAKE/broken" ]] || { touch "$FAKE/broken"; exit 255; }\n'
    gcloud.write_text(gcloud.read_text().replace("worker=all line", broken + "worker=all line", 1))
    program = ["bash", "-c", "echo run >>../count; sleep 2; echo done"]
    call = [*CALL, "--no_install", "--restarts=3", "--", *program]
    done = launch(*call, fake=tmp_path, MATHV2_RETRY_SECONDS="0.1")
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
    assert "the connection is gone" in done.stderr
    assert [(home / "count").read_text() for home in workers] == ["run\n"] * 2


def test_flags_that_cannot_be_had_stop_the_start(workers, tmp_path):
    (workers[1] / "mathv2_jax" / ".venv" / "bin" / "mathv2-compile").write_text(
        "#!/bin/sh\nexit 2\n"
    )
    options = ["--type=v5p-16", "--no_install"]
    done = launch(*CALL, *options, "--", "touch", "../ran", fake=tmp_path)
    assert done.returncode != 0 and not (workers[1] / "ran").exists()


def test_a_run_that_is_there_is_not_started_twice_but_followed_and_stopped(workers, tmp_path):
    saves = "trap 'echo saved; exit 75' TERM; echo begun; while true; do sleep 0.05; done"
    program = ["bash", "-c", saves]
    fake = dict(os.environ, FAKE=str(tmp_path), PATH=f"{tmp_path}/bin:{os.environ['PATH']}")
    command = ["bash", "tools/launch_tpu.sh", *CALL, "--no_install", "--", *program]
    first = subprocess.Popen(command, cwd=ROOT, env=fake, stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None and first.stdout.readline() == "begun\n"
    second = launch(*CALL, "--no_install", "--", *program, fake=tmp_path)
    assert second.returncode == 1 and "a run is still there" in second.stderr
    time.sleep(0.1)
    assert launch(*CALL, "--stop", fake=tmp_path).returncode == 0
    first.communicate(timeout=20)
    assert first.returncode == 75
    followed = launch(*CALL, "--follow", fake=tmp_path)
    assert followed.returncode == 75
    assert followed.stdout.startswith("begun\n") and followed.stdout.endswith("saved\n")
    assert (workers[1] / "mathv2_jax" / "run.code").read_text() == "75\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--name=a"], "--name=NAME and --zone=ZONE must be given"),
        ([*CALL, "--typ=v5p-8"], "--typ=v5p-8 is none of the options that --help lists"),
        (CALL, "no command: give it after --"),
        ([*CALL, "--slices=2", "--", "x"], "needs --queue"),
        ([*CALL, "--follow", "--restarts=1"], "what only follows starts nothing"),
        ([*CALL, "--slices=none", "--", "x"], "--slices=none: give a positive number"),
        ([*CALL, "--type=v9-8", "--dry_run", "--", "x"], "name it with --runtime=VERSION"),
    ],
)
def test_what_cannot_be_started_is_one_line(arguments, message):
    done = launch(*arguments)
    assert done.returncode == 2 and message in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("script", ["launch_tpu.sh", "launch_gke.sh"])
def test_help_is_the_scripts_usage_and_a_misspelt_option_one_line(script):
    asked = launch("--slices=2", "--help", script=script)
    assert (asked.returncode, asked.stderr) == (0, "")
    assert f"  bash tools/{script} --" in asked.stdout and "--dry_run " in asked.stdout
    assert "set -euo" not in asked.stdout and "#" not in asked.stdout
    wrong = launch("--dryrun", script=script)
    assert (wrong.returncode, wrong.stdout) == (2, "") and wrong.stderr.count("\n") == 1


@pytest.mark.parametrize("queue", [[], ["--queue"]])
def test_to_follow_a_run_makes_no_machine(workers, tmp_path, queue):
    checkout = workers[0] / "mathv2_jax"
    (checkout / "run.log").write_text("was here\n")
    (checkout / "run.code").write_text("3\n")
    (checkout / "run.pid").write_text("999999999\n")
    done = launch(*CALL, "--type=v5p-16", *queue, "--follow", fake=tmp_path)
    assert (done.returncode, done.stdout) == (3, "was here\n"), done.stderr
    assert "create" not in (tmp_path / "calls").read_text()


@pytest.mark.parametrize(
    ("command", "added"),
    [
        (["mathv2-train", "--config=a"], True),
        ([".venv/bin/mathv2-train", "--config=a"], True),
        (["python", "-m", "mathv2_jax.cli.train", "--config=a"], True),
        (["env", "A=1", "mathv2-train", "--config=a"], True),
        (["mathv2-train", "--coordinator=none"], False),
        (["mathv2-train", "--coordinator", "none"], False),
        (["mathv2-convert", "--config=a"], False),
        (["python", "-c", "mathv2_jax.cli.train"], False),
    ],
)
def test_a_training_command_finds_its_cluster_unless_it_says_how(command, added):
    for script, options in (
        ("launch_tpu.sh", CALL),
        ("launch_gke.sh", ["--cluster=c", "--workload=w", "--type=v5p-16"]),
    ):
        done = launch(*options, "--dry_run", "--", *command, script=script)
        assert done.returncode == 0, done.stderr
        assert ("--coordinator=auto" in done.stdout) is added


def test_a_workload_of_a_cluster_is_one_command_of_xpk():
    options = ["--cluster=c", "--workload=w", "--type=v5litepod-16", "--zone=z", "--dry_run"]
    train = ["mathv2-train", "--config=a.py", "--workdir=gs://b/r"]
    done = launch(*options, "--", *train, script="launch_gke.sh")
    assert done.returncode == 0, done.stderr
    (call,) = [read_back(line) for line in done.stdout.splitlines()]
    assert call[:4] == ["xpk", "workload", "create", "--cluster=c"]
    inside = call[-1].removeprefix("--command=").split(" && ")
    assert inside[-1].split() == ["exec", *train, "--coordinator=auto"]
    assert "--topology=v5litepod-16 --xla_flags" in inside[-3]
    assert "--restart-on-exit-codes=1,75" in call
    assert "--cluster=CLUSTER" in launch("--", "x", script="launch_gke.sh").stderr
