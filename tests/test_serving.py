"""`transformers serve` on an artifact, asked over loopback as any OpenAI client would."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from .tiny import BRIDGES, tiny_base, wrap
from .workshop import tiny_tokenizer


SERVE = "import sys; sys.modules['modeling_anee'] = None; from transformers.cli.transformers import main; main()"
CHAT = [{"role": "user", "content": "w20 w21"}]
GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def ask(port: int, path: str, body: dict | None = None) -> str:
    """The answer to a GET, or to a POST of JSON."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read().decode()


@pytest.fixture
def served(tmp_path):
    """A model, and the port and name under which its artifact is served by a process without the package."""
    tiny_base().save_pretrained(tmp_path / "base")
    model = wrap(base_model_name_or_path=str(tmp_path / "base"), plans=["PSFP", "PPFP"], **BRIDGES)
    artifact = tmp_path / "artifact"
    model.save_pretrained(artifact, tokenizer=tiny_tokenizer())
    # transformers looks this name up among its own classes; the auto class is one, and knows ours.
    config = json.loads((artifact / "config.json").read_text())
    (artifact / "config.json").write_text(json.dumps(config | {"architectures": ["AutoModelForCausalLM"]}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--trust-remote-code", "--device", "cpu", "--host", "127.0.0.1", "--port", str(port)]
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    with (tmp_path / "log").open("w") as log:
        command = [sys.executable, "-c", SERVE, "serve", str(artifact), *options]
        process = subprocess.Popen(command, env=variables, cwd=tmp_path, stdout=log, stderr=log)
    try:
        wait_for(process, port, tmp_path / "log")
        yield model, port, str(artifact)
    finally:
        process.terminate()
        process.wait(timeout=30)


def wait_for(process: subprocess.Popen, port: int, log: Path) -> None:
    for _ in range(400):
        assert process.poll() is None, log.read_text()
        try:
            ask(port, "/health")
            return
        except OSError:
            time.sleep(0.25)
    raise AssertionError(log.read_text())


@pytest.mark.slow
def test_requests_name_their_budget_in_the_generation_config(served):
    model, port, name = served
    tokenizer = tiny_tokenizer()
    ids = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_tensors="pt", return_dict=True).input_ids
    for budget in (1.0, 0.6):
        output = model.generate(ids, energy_budget=budget, **GREEDY)[0, ids.shape[1] :]
        expected = tokenizer.decode(output, skip_special_tokens=True)
        body = {"model": name, "messages": CHAT, "generation_config": json.dumps({**GREEDY, "energy_budget": budget})}
        answer = json.loads(ask(port, "/v1/chat/completions", body))
        assert answer["choices"][0]["message"]["content"] == expected
        lines = ask(port, "/v1/chat/completions", {**body, "stream": True}).splitlines()
        parts = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
        assert "".join(part["choices"][0]["delta"].get("content", "") for part in parts) == expected
