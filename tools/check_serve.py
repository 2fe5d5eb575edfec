"""An exported tiny model answers a chat completion when `transformers serve` serves its folder.

    python tools/check_serve.py [--model=DIR] [--seconds=300]

Without --model a tiny DeepSeek-V3 and a tiny DeepSeek-V3.2 with random weights and a SentencePiece
tokenizer of ours are exported into a temporary folder by mathv2-convert, first. The server listens
on 127.0.0.1 alone and looks nothing up elsewhere. Exit code 0 where every model answers.
"""

import argparse
import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def export(at: pathlib.Path, kind: str) -> pathlib.Path:
    """A folder with a random model whose vocabulary is a tokenizer's."""
    import dataclasses

    import jax
    import numpy as np
    from etils import epath

    from configs.models import tiny_v3, tiny_v32
    from mathv2_jax import checkpoint
    from mathv2_jax.hf import folder
    from mathv2_jax.model import transformer
    from mathv2_jax.model.config import ModelConfig
    from mathv2_jax.text import tokenizer, tokenizer_files

    texts = ["Prove that the sum of two even numbers is even.", "Let n = 2 k. Then n is even."] * 9
    made = tokenizer.SentencePieceTokenizer.from_bytes(tokenizer.train(texts, vocab_size=330))
    module = {"v3": tiny_v3, "v32": tiny_v32}[kind]
    config = ModelConfig(**module.model() | dict(max_position=256, yarn_factor=16.0))
    config = dataclasses.replace(config, vocab_size=made.vocab_size)
    variables = transformer.init(config, jax.random.key(0))
    named = {
        jax.tree_util.keystr(path, simple=True, separator="."): x
        for path, x in jax.tree.leaves_with_path(variables)
    }
    with checkpoint.Checkpoints(at / kind / folder.CHECKPOINTS) as saved:
        saved.save(0, named, {})
    for name, data in tokenizer_files.files_of(made).items():
        (at / kind / folder.TOKENIZER).mkdir(exist_ok=True)
        (at / kind / folder.TOKENIZER / name).write_bytes(data)
    ids = {"bos_token_id": made.bos_id, "eos_token_id": made.eos_id, "pad_token_id": made.pad_id}
    folder.write_config(epath.Path(at / kind), config, ids)
    assert np.isfinite(np.asarray(named["params.embed"])).all()
    target = at / f"{kind}-hf"
    command = [sys.executable, "-m", "mathv2_jax.cli.convert", "--verify"]
    subprocess.run(
        [*command, f"--to_hf={target}", f"--checkpoint={at / kind}"], cwd=ROOT, check=True
    )
    return target


@contextlib.contextmanager
def serving(end: float) -> Iterator[str]:
    """The URL of a server that has started before `end`, a moment of `time.monotonic`.

    RuntimeError with the end of its log where it does not, or where the block fails.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    entry = "from transformers.cli.transformers import main; main()"
    command = [sys.executable, "-c", entry, "serve", "--host", "127.0.0.1", "--port", str(port)]
    with tempfile.TemporaryFile("w+") as log, tempfile.TemporaryDirectory() as home:
        (pathlib.Path(home) / "hub").mkdir()  # looked into even offline
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": home}
        server = subprocess.Popen(
            [*command, "--device", "cpu"], stdout=log, stderr=log, env=environment
        )
        try:
            url = f"http://127.0.0.1:{port}"
            _wait(server, f"{url}/health", end)
            yield url
        except (OSError, RuntimeError) as error:
            log.seek(0)
            raise RuntimeError(f"{error}\n{log.read()[-3000:]}") from error
        finally:
            server.send_signal(signal.SIGTERM)
            try:
                server.wait(timeout=20)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def _wait(server: subprocess.Popen[bytes], url: str, end: float) -> None:
    while True:
        if server.poll() is not None:
            raise RuntimeError(f"the server ended with exit code {server.returncode}")
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except (urllib.error.URLError, OSError) as error:
            if time.monotonic() > end:
                raise RuntimeError(f"the server does not answer: {error}") from error
            time.sleep(0.5)


def _ask(url: str, model: pathlib.Path, end: float) -> dict[str, Any]:
    body = {
        "model": str(model),
        "messages": [{"role": "user", "content": "Is 4 even?"}],
        "max_tokens": 8,
        "stream": False,
    }
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=max(1.0, end - time.monotonic())) as answer:
        return json.load(answer)


def main() -> int:
    """Prints one line for each model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=pathlib.Path, help="an exported folder")
    parser.add_argument("--seconds", type=float, default=300.0, help="patience, in all")
    arguments = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as at:
        models = [arguments.model] if arguments.model else []
        models = models or [export(pathlib.Path(at), kind) for kind in ("v3", "v32")]
        end = time.monotonic() + arguments.seconds
        with serving(end) as url:
            found = [model.resolve() for model in models]
            answers = [_ask(f"{url}/v1/chat/completions", model, end) for model in found]
    for model, answer in zip(models, answers, strict=True):
        choice = answer["choices"][0]
        content = choice["message"]["content"]
        if choice["message"]["role"] != "assistant" or not isinstance(content, str):
            raise RuntimeError(f"{model.name} gave no answer: {answer}")
        print(f"{model.name}: {content!r} ({choice['finish_reason']})")
    print(f"all answered, {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
