"""What looks like a secret is found by its name or its text; a vocabulary, a picture and a card are not."""

import pytest

from modeling_anee.data.smollm2 import SHIPPED_ARTIFACT
from modeling_anee.publishing.secret_files import secret, secrets


@pytest.mark.parametrize(
    "name",
    [
        "prod.env",
        "env",
        "key.pem",
        "id_rsa",
        "ID_RSA",
        "id_ed25519",
        "credentials.json",
        "aws_credentials",
        "client_secret.json",
    ]
    + ["passwords.txt", "token", "token.txt", "service-account-1.json", "server.key"],
)
def test_names_of_secrets(tmp_path, name):
    (tmp_path / name).write_text("")
    assert secret(tmp_path / name) == f"{name} looks like a secret by its name"


# Put together here, so that no scanner takes this file for a leak.
TEXTS = {
    "a private key": "-----BEGIN OPENSSH " + "PRIVATE KEY-----\nb3Bl",
    "a token of the Hub": "login(token='hf_" + "aB3" * 12 + "')",
    "a token of GitHub": "ghp_" + "aB3" * 12,
    "a token of PyPI": "password = pypi-AgEI" + "cHlwaS5vcmcCJ",
    "a key of AWS": "AKIA" + "ABCD" * 4,
    "a key of an API": "sk-" + "proj-" + "aB3_" * 10,
}


@pytest.mark.parametrize("what", TEXTS)
def test_texts_with_secrets(tmp_path, what):
    (tmp_path / "notes.md").write_text(f"# Notes\n\n{TEXTS[what]}\n")
    reason = secret(tmp_path / "notes.md")
    assert reason == f"notes.md holds what looks like {what}"
    assert TEXTS[what] not in reason


@pytest.mark.parametrize("text", ["hf_user", "use hf_hub_download(...)", "HF_TOKEN", "sk-learn", "a task-" + "x" * 40, "AKIA"])
def test_texts_without(tmp_path, text):
    for name in ("tokenizer.json", "README.md", "environment.md", "keys.md", "monkey.py"):
        (tmp_path / name).write_text(text)
        assert secret(tmp_path / name) is None


def test_what_is_shipped_looks_like_none():
    assert secrets(list(SHIPPED_ARTIFACT.iterdir()), ()) == []


def test_a_file_can_be_allowed_by_its_name(tmp_path):
    for name in ("token.txt", "key.pem"):
        (tmp_path / name).write_text("")
    files = list(tmp_path.iterdir())
    (problem,) = secrets(files, ["key.pem"])
    assert problem.startswith("token.txt looks like") and "--allow FILE" in problem
    assert secrets(files, ["key.pem", "token.txt"]) == []
    with pytest.raises(ValueError, match="--allow other: there is no such file"):
        secrets(files, ["other"])
